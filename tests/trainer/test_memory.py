"""Predicted bytes beside those that the benchmark measured, which count the same things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_trainer.preflight.memory import HeadStep, size

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "linear_cpu.json").read_text())
STEPS = {entry["name"]: entry for entry in RESULTS["measurements"] if entry["mode"] != "no_grad"}


@pytest.mark.parametrize("name", STEPS)
def test_predictions_are_near_what_was_measured(name):
    """Whole logits within a few per cent; workspaces may fit into memory that was freed before."""
    work, results = STEPS[name]["workload"], STEPS[name]["results"]
    step = HeadStep(2 * work["pairs"], work["tokens"], work["labelled"], work["vocab"], work["dim"])
    fused, measured = step.fused("cpu") / 2**20, results["cwdpo_kernels"]["extra_mib"]
    assert measured <= fused <= measured + 16
    if "eager, full logits" in results:
        whole = results["eager, full logits"]["extra_mib"]
        assert step.whole_logits() / 2**20 == pytest.approx(whole, rel=0.06)


def test_a_step_smaller_than_the_budget_takes_what_it_needs():
    step = HeadStep(2, 10, 4, 100, 8)
    assert step.fused("cuda") == 4 * 4 * 100 + 4 * 4 * 4 * 8
    assert step.whole_logits() == 3 * 4 * 2 * 10 * 100


def test_sizes_are_readable():
    assert [size(2048), size(3 << 19), size(5 << 30)] == ["2.0 KiB", "1.5 MiB", "5.0 GiB"]
