"""What every Triton kernel compiles to on its chips, with every shipped configuration. No GPU is needed for that.

benchmarks/results/triton_compiled.json has all of it. Compiling takes minutes, so `make test` checks that the report is
of the kernels as they are, and compiles the main ones again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cwdpo_kernels import ops

pytest.importorskip("triton")
import triton

from benchmarks import compiled_checks, sass

ROOT = Path(__file__).parents[1]
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "triton_compiled.json").read_text())
ROWS = COMMITTED["kernels"]
CHIPS = {"sm_80", "sm_90", "sm_100", "gfx942"}
OTHER_CHIPS = {"sm_86", "sm_89", "sm_120", "sm_121", "gfx90a", "gfx950"}
REGENERATE = "run python -m benchmarks.compiled and commit its report"


def compiled_now(out, *options):
    """The rows of a new report, from a separate process: this one may use the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--out", str(out), *options]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())["kernels"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """All launches; those of the main kernels on sm_90 are compiled and meet their requirements."""
    return compiled_now(tmp_path_factory.mktemp("compiled") / "quick.json", "--quick")


def identity(row):
    return [row[name] for name in ("chip", "precision", "dim", "kernel", "digest", "constants", "enable_fp_fusion")]


def test_every_kernel_on_every_chip():
    """The committed report has all kernels that the sources define."""
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "cwdpo_kernels" / "triton").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert {(row["chip"], row["kernel"]) for row in ROWS} == {(chip, kernel) for chip in CHIPS for kernel in kernels}


def test_every_requirement_is_met():
    """Shared memory, spills, matrix instructions, waits, TMA and 16-byte stores: compiled_checks.failures."""
    assert [problem for row in ROWS for problem in compiled_checks.failures(row)] == []


def test_the_committed_report_is_of_these_kernels(quick):
    """A row has a digest of its kernel's code. Constants come from the launch configurations."""
    assert list(map(identity, ROWS)) == list(map(identity, quick)), f"kernels have changed: {REGENERATE}"


def test_every_kernel_is_compiled_with_the_options_of_a_launch(quick):
    assert all(row["enable_fp_fusion"] is True for row in quick)


def test_no_kernel_got_worse(quick):
    compiled = [row for row in quick if "registers" in row]
    assert {row["kernel"] for row in compiled} == set(compiled_checks.TILE_KERNELS)
    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the report is of Triton {COMMITTED['triton']}")
    assert compiled_checks.worse(ROWS, compiled) == [], f"if that is meant, {REGENERATE} with --worse REASON"


@pytest.mark.slow
def test_the_whole_report(tmp_path):
    """Compiles everything."""
    new = compiled_now(tmp_path / "report.json")
    assert list(map(identity, ROWS)) == list(map(identity, new))
    if triton.__version__ == COMMITTED["triton"]:
        assert new == ROWS


@pytest.mark.slow
def test_chips_that_use_the_launch_configurations_of_another_one(tmp_path):
    """The matrix products meet the chip's limits; without tf32 they are exact."""
    rows = compiled_now(tmp_path / "report.json", "--chip", *sorted(OTHER_CHIPS))
    assert {(row["chip"], row["kernel"]) for row in rows} == {
        (chip, kernel) for chip in OTHER_CHIPS for kernel in compiled_checks.GEMM_KERNELS
    }
    found = {(row["chip"], row["constants"]["PRECISION"]) for row in rows if "tf32" in row["constants"].values()}
    assert found == {(chip, "tf32") for chip in OTHER_CHIPS - {*compiled_checks.WITHOUT_TF32}}


def row_of(kernel, *flags):
    """The committed row on sm_90 in half precision, a new copy."""
    name = " ".join(["sm_90", "half", "D 4096", kernel, *flags])
    return dict(next(row for row in ROWS if compiled_checks.name_of(row) == name))


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        ({"spill_bytes": 8}, "a stack frame of 8 bytes a thread"),
        ({"shared_bytes": 300 << 10}, "307200 bytes of shared memory, the limit is 232448"),
        ({"matrix_instructions": 0}, "no wgmma.mma_async"),
        ({"waits": [0]}, "the main loop waits until [0] groups of wgmma run, not [1]"),
        ({"waits": []}, "the main loop waits until [] groups of wgmma run, not [1]"),
        ({"tma_instructions": 0}, "no cp.async.bulk.tensor"),
        ({"before_tma": 900}, "900 instructions before the first cp.async.bulk.tensor, at most 400"),
        ({"before_tma": None}, "None instructions before the first cp.async.bulk.tensor, at most 400"),
        ({"wide_stores": 15}, "15 stores of 16 bytes, 16 would write the tile"),
    ],
    ids=str,
)
def test_a_planted_failure(planted, problem):
    row = row_of("_sweep_kernel", "HAS_MIN_ANCHOR", "WRITE_TILE")
    assert compiled_checks.failures(row) == []
    expected = f"sm_90 half D 4096 _sweep_kernel HAS_MIN_ANCHOR WRITE_TILE: {problem}"
    assert compiled_checks.failures(row | planted) == [expected]


def test_a_planted_slowdown_names_kernel_before_and_after():
    row = row_of("_gradient_kernel")
    before = row["instructions_per_element"]
    more = row | {"instructions_per_element": before + 1}
    assert compiled_checks.worse([row], [row]) == compiled_checks.worse([more], [row]) == []
    expected = f"sm_90 half D 4096 _gradient_kernel: instructions_per_element {before} -> {before + 1}"
    assert compiled_checks.worse([row], [row, more]) == [expected]


class Here:
    """A pool of processes that is this process."""

    def __init__(self, workers):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_a_report_that_is_worse_needs_a_reason(tmp_path, monkeypatch):
    """One row stands for all."""
    from benchmarks import compiled

    out, row = tmp_path / "report.json", row_of("_merge_kernel")

    def report(spilled, *options):
        monkeypatch.setattr(compiled, "compile_chip", lambda chip, quick: [row | {"spill_bytes": spilled}])
        monkeypatch.setattr(compiled, "ProcessPoolExecutor", Here)
        monkeypatch.setattr(sys, "argv", ["compiled", "--chip", "sm_90", "--out", str(out), *options])
        compiled.main()
        return json.loads(out.read_text())

    report(0)
    change = "sm_90 half D 4096 _merge_kernel: spill_bytes 0 -> 8"
    with pytest.raises(SystemExit, match=f"{change}\ncompiled: expected no kernel to get worse.*--worse REASON"):
        report(8)
    assert json.loads(out.read_text())["kernels"][0]["spill_bytes"] == 0
    assert report(8, "--worse", "a larger tile")["worse"] == [f"{change}: a larger tile"]


CODE = """
_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 BRA `(.L_x_0) ;
        /*0020*/                   UTMALDG.2D [UR8], [UR14] ;
.L_x_1:
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0060*/                   MUFU.EX2 R1, R2 ;
        /*0070*/              @!P2 BRA `(.L_x_2) ;
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/                   FADD R1, R1, R2 ;
.L_x_2:
        /*00a0*/              @P3 STG.E.128 desc[UR26][R74.64], R24 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*00d0*/                   NOP;
"""
PERSISTENT = CODE.replace("_kernel:\n", "_kernel:\n.L_x_4:\n").replace("    EXIT ;", "@P4 BRA `(.L_x_4) ;")


def test_instructions_of_a_tile():
    """The way through the main loop, past the two instructions of the branch."""
    found = sass.counts(CODE, persistent=False)
    assert found == {
        "step_instructions": 3, "tile_instructions": 7, "before_matrix": 3, "before_tma": 2, "waits": [1],
        "wide_stores": 1, "special_functions": 1,
    }  # fmt: skip


def test_instructions_of_a_tile_of_a_persistent_program():
    """From a tile's last store to the next one's: with the branch back in place of EXIT."""
    assert sass.counts(PERSISTENT, persistent=True) == sass.counts(CODE, persistent=False)


def test_the_gpu_backend_has_a_name():
    assert ops.backend("cuda") == "triton"
