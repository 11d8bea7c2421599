"""Predicted bytes beside those that the benchmark measured, which count the same things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_trainer.memory import HeadStep, size

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "linear_cwdpo_cpu.json").read_text())
MEASURED = {entry["workload"]["name"]: entry for entry in RESULTS["measurements"]}


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_near_what_was_measured(name):
    work, results = MEASURED[name]["workload"], MEASURED[name]["results"]
    sequences = 2 * work["pairs"]
    step = HeadStep(sequences, work["tokens"], sequences * work["response"], work["vocab"], work["dim"])
    fused = step.fused("cpu", work["trainable"]) / 2**20
    assert fused == pytest.approx(results["cwdpo_kernels"]["extra_mib"], rel=0.35)
    if "eager" in results:
        assert step.whole_logits() / 2**20 == pytest.approx(results["eager"]["extra_mib"], rel=0.06)


def test_a_step_smaller_than_the_budget_takes_what_it_needs():
    step = HeadStep(2, 10, 4, 100, 8)
    assert step.fused("cuda", True) == 4 * 4 * 100 + 4 * 4 * 4 * 8
    assert step.whole_logits() == 3 * 4 * 2 * 10 * 100


def test_sizes_are_readable():
    assert [size(2048), size(3 << 19), size(5 << 30)] == ["2.0 KiB", "1.5 MiB", "5.0 GiB"]
