"""The predicted memory of the head against what the benchmarks measured, which count the same things."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_trainer.preflight.memory import HeadStep, format_bytes

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "linear_cpu.json").read_text())
STEPS = {entry["name"]: entry for entry in RESULTS["measurements"] if entry["mode"] != "no_grad"}


@pytest.mark.parametrize("name", STEPS)
def test_predictions_are_close_to_measurements(name):
    """Full logits within 6 %. The fused head may measure less than predicted, if it reuses freed memory."""
    work, results = STEPS[name]["workload"], STEPS[name]["results"]
    step = HeadStep(2 * work["pairs"], work["tokens"], work["labeled"], work["vocab"], work["dim"])
    fused, measured = step.fused("cpu") / 2**20, results["cwdpo_kernels"]["extra_mib"]
    assert measured <= fused <= measured + 16
    if "eager, full logits" in results:
        whole = results["eager, full logits"]["extra_mib"]
        assert step.full_logits() / 2**20 == pytest.approx(whole, rel=0.06)


def test_a_small_step_needs_less_than_the_workspace():
    step = HeadStep(2, 10, 4, 100, 8)
    assert step.fused("cuda") == 4 * 4 * 100 + 4 * 4 * 4 * 8
    assert step.full_logits() == 3 * 4 * 2 * 10 * 100


def test_sizes_are_readable():
    assert [format_bytes(2048), format_bytes(3 << 19), format_bytes(5 << 30)] == ["2.0 KiB", "1.5 MiB", "5.0 GiB"]
