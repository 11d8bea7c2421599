"""Every Triton kernel compiles for its chips with every shipped configuration. No GPU is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cwdpo_kernels import ops

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "triton_compiled.json"
CHIPS = {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A new report, from a separate process: this one may use the interpreter."""
    out = tmp_path_factory.mktemp("compiled") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return result, json.loads(out.read_text()) if out.exists() else None


def test_every_requirement_is_met(report):
    """Shared memory within the chip's limit; GEMM kernels use its matrix instructions and do not spill."""
    result, _ = report
    assert result.returncode == 0, result.stderr


def test_every_kernel_on_every_chip(report):
    """The report has all kernels that the sources define."""
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "cwdpo_kernels" / "triton").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    compiled = {(row["chip"], row["kernel"]) for row in report[1]["kernels"]}
    assert compiled == {(chip, kernel) for chip in CHIPS for kernel in kernels}


def test_every_kernel_is_compiled_with_the_options_of_a_launch(report):
    assert all(row["enable_fp_fusion"] is True for row in report[1]["kernels"])


def test_the_committed_report_has_the_same_kernels(report):
    """Register counts may change with the compiler, but not the kernels and their constants."""

    def shapes(document):
        return [(row["chip"], row["precision"], row["kernel"], row["constants"]) for row in document["kernels"]]

    assert shapes(json.loads(RESULT.read_text())) == shapes(report[1])


def test_the_gpu_backend_has_a_name():
    assert ops.backend("cuda") == "triton"
