"""Persistent kernels become one loop over tiles and steps, so that the next tile's loads overlap an epilogue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def loops():
    """The loops of each kernel, from a separate process: this one may use the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_loops"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kernel", ["_sweep_kernel", "_gradient_kernel"])
def test_tiles_and_steps_are_one_loop(loops, kernel):
    """No loop but the one around the product, in which the epilogue is conditional."""
    (loop,) = loops[f"{kernel}, sparse_grad False"]
    assert loop["product"]
    assert loop["stores"] > 0
    assert loop["unconditional"] == 0


def test_skipped_blocks_need_a_loop_of_steps_inside(loops):
    """Here the number of steps depends on data. This shows that the test above can tell the difference."""
    assert [loop["depth"] for loop in loops["_sweep_kernel, sparse_grad True"] if loop["product"]] == [1, 0]
