"""The targets of `make`: what they pass to the set-up, what they remove, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VARIABLES = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "VENV", "TORCH"}
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the Makefile, in a folder with a space, whose set-up only writes its arguments down."""
    folder = tmp_path / "a folder"
    (folder / "tools").mkdir(parents=True)
    (folder / "csrc").mkdir()
    (folder / "cwdpo_kernels").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "tools" / "set_up.py").write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)\n"
        "pathlib.Path('arguments').write_text('|'.join(sys.argv[1:]))\n"
    )
    return folder


def make(folder, *arguments):
    """Run make without the variables of a `make test` around this test."""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "venv", ["my env", "", "a'b", 'a"b', "a;b", "a$$b", "a:b", "a#b", "a*", "~/x", "-x", "a\\b", "`x`"]
)
def test_make_refuses_an_odd_venv_in_one_line(checkout, venv):
    (checkout / "my").touch()
    for target in ("demo", "clean"):
        result = make(checkout, target, f"VENV={venv}")
        assert result.returncode == 2
        assert "VENV: expected a path without spaces and special characters, got" in result.stderr
        assert result.stderr.count("\n") == 1
    assert (checkout / "my").exists()


@pytest.mark.parametrize(
    "torch", ["torch==2.11.0+cpu triton==3.6.0", "torch>=2.11,<3", '"', "a';b", "$(touch ran)", "`touch ran`", "-rx"]
)
def test_make_passes_torch_on_as_it_is(checkout, torch):
    result = make(checkout, "rebuild", f"TORCH={torch.replace('$', '$$')}", "VENV=env")
    assert (result.returncode, result.stderr) == (0, "")
    assert not (checkout / "ran").exists()
    assert (checkout / "arguments").read_text() == f"--venv|env|--torch={torch}"
    assert len(list((checkout / "env").glob("ready-*"))) == 1


def test_make_rebuild_removes_only_the_library(checkout):
    kept = [checkout / ".venv" / "bin", checkout / "runs" / "digits"]
    for folder in kept:
        folder.mkdir(parents=True)
    library = checkout / "cwdpo_kernels" / "libcwdpo_cpu.so"
    for file in (library, checkout / ".venv" / "ready"):
        file.touch()
    assert make(checkout, "rebuild").returncode == 0
    assert (checkout / "arguments").exists()  # the set-up ran again
    assert not library.exists()
    assert all(folder.exists() for folder in kept)


@pytest.mark.parametrize("made_by_make", [True, False])
def test_make_clean_keeps_runs_and_environments_of_others(checkout, made_by_make):
    for name in ("env/bin", ".venv-2.15", "runs", "build", "dist"):
        (checkout / name).mkdir(parents=True)
    ready = [checkout / "env" / "ready", checkout / "env" / "ready-1", checkout / ".venv-2.15" / "ready"]
    library = checkout / "cwdpo_kernels" / "libcwdpo_cpu.so"
    for file in (*ready, library):
        file.touch()
    if made_by_make:
        (checkout / "env" / "made-by-make").touch()
    result = make(checkout, "clean", "VENV=env")
    assert result.returncode == 0
    assert "clean: runs stays" in result.stdout
    assert ("env stays, because make did not create it" in result.stdout) == (not made_by_make)
    assert (checkout / "env" / "bin").exists() == (not made_by_make)
    assert (checkout / "runs").exists()
    assert not any(path.exists() for path in (*ready, library, checkout / "build", checkout / "dist"))


def test_make_docs_uses_the_set_up(checkout):
    make(checkout, "docs")
    assert (checkout / "arguments").read_text() == "--venv|build/docs|--docs"


def test_make_gpu_says_what_is_missing(checkout):
    bare = checkout / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    result = make(checkout, "gpu", f"PYTHON={bare}")
    assert result.stderr.startswith("gpu: this Python has no torch and no pytest, and make gpu installs nothing")
    result = make(checkout, "gpu", "PYTHON=no-such-python")
    assert result.stderr.startswith("set-up: no-such-python was not found")


def test_the_sanitized_build_finds_its_python_in_a_folder_with_a_space(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "ready").touch()
    assert make(checkout, "-n", "sanitize").stdout.count(f'"{checkout}/.venv/bin/python"') == 2


def test_make_says_what_to_do_about_python(tmp_path):
    def errors(python):
        result = make(ROOT, "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert result.returncode == 2
        return result.stderr.splitlines()

    assert errors("no-such-python")[0].startswith("set-up: no-such-python was not found. Install Python 3.11")
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $2"\n')
    old.chmod(0o755)
    assert errors(old)[0].startswith("set-up: expected Python 3.11 to 3.13, got 3.10. Name another one")
