"""Every Triton kernel, at every shipped configuration, compiles for its chip: no GPU is needed to know."""

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
    """Compiled anew, in a process of its own: this one may be running the interpreter."""
    out = tmp_path_factory.mktemp("compiled") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return result, json.loads(out.read_text()) if out.exists() else None


def test_every_requirement_is_met(report):
    """No spills and the chip's matrix instructions in the GEMM kernels, shared memory within its limit."""
    result, _ = report
    assert result.returncode == 0, result.stderr


def test_every_kernel_on_every_chip(report):
    """The recorder met every kernel there is: none is left out of the report."""
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


def test_the_committed_report_is_of_these_kernels(report):
    """Registers may move with the compiler; which kernels are compiled, and with which constants, may not."""

    def shapes(document):
        return [(row["chip"], row["precision"], row["kernel"], row["constants"]) for row in document["kernels"]]

    assert shapes(json.loads(RESULT.read_text())) == shapes(report[1])


def test_the_gpu_backend_has_a_name():
    assert ops.backend("cuda") == "triton"
