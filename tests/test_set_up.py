"""The set-up of `make`: which torch it takes, and what it says when something is missing. Nothing is downloaded."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("set_up", ROOT / "tools" / "set_up.py")
set_up = importlib.util.module_from_spec(spec)
sys.modules["set_up"] = set_up  # dataclasses look their module up
spec.loader.exec_module(set_up)

PIN = "torch==9.9.0"
NOT_FOUND = "ERROR: No matching distribution found for torch==9.9.0+cpu"
CPU_BUILD, FROM_INDEX, FROM_PYPI = set_up.torch_sources("", PIN, cpu_only=True)


@pytest.fixture
def pip(monkeypatch):
    """A pip that fails as `outputs` says, one entry per call ("" succeeds), and records its arguments."""
    calls, outputs = [], []

    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "install"]
        calls.append(command[command.index("--constraint") + 2 :])
        output = outputs.pop(0)
        return subprocess.CompletedProcess(command, int(bool(output)), stdout=output)

    monkeypatch.setattr(set_up.subprocess, "run", run)
    return calls, outputs


def install(sources):
    set_up.install_torch(set_up.Environment(Path("venv")), sources, Path("constraints.txt"))


def arguments(source):
    return [*source.options, *source.requirements]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([""], [CPU_BUILD]),
        ([NOT_FOUND, ""], [CPU_BUILD, FROM_INDEX]),
        ([NOT_FOUND, NOT_FOUND, ""], [CPU_BUILD, FROM_INDEX, FROM_PYPI]),
    ],
)
def test_without_a_gpu_the_first_source_that_has_torch_is_taken(pip, capsys, outputs, expected):
    calls, to_come = pip
    to_come += outputs
    install([CPU_BUILD, FROM_INDEX, FROM_PYPI])
    assert calls == [arguments(source) for source in expected]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(expected) + (FROM_PYPI in expected)  # one line per step, and the note
    assert ("2.7 GB to download" in "".join(lines[:-1])) == (FROM_PYPI in expected)


def test_the_cpu_build_is_asked_for_by_its_local_version():
    assert arguments(CPU_BUILD) == ["torch==9.9.0+cpu"]
    assert FROM_INDEX.requirements == CPU_BUILD.requirements
    assert "--index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 0" in " ".join(FROM_INDEX.options)
    assert arguments(FROM_PYPI) == ["torch==9.9.0"]


def test_any_other_failure_ends_the_set_up_and_shows_the_output(pip, capsys):
    """A full disk, for example, must not lead to a download of gigabytes."""
    calls, outputs = pip
    outputs += ["ERROR: No space left on device"]
    with pytest.raises(SystemExit, match=r"No space left on device\nset-up: failed: .*pip install"):
        install([CPU_BUILD, FROM_INDEX, FROM_PYPI])
    assert len(calls) == 1
    assert capsys.readouterr().out.endswith("failed (0 s)\n")


def test_with_a_gpu_and_with_a_request_there_is_one_source(pip):
    [source] = set_up.torch_sources("", PIN, cpu_only=False)
    assert arguments(source) == [PIN]
    [source] = set_up.torch_sources("torch==9.8.0+cpu triton==3.3.0", PIN, cpu_only=True)
    assert arguments(source) == ["torch==9.8.0+cpu", "triton==3.3.0"]
    pip[1].append(NOT_FOUND)
    with pytest.raises(SystemExit, match="No matching distribution"):
        install([source])


@pytest.mark.parametrize("constraint", ["numpy>0", "torch<9"])
def test_pip_says_not_found_in_the_words_that_are_looked_for(tmp_path, constraint):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(constraint)
    options = ["--no-index", "--dry-run", "--no-deps", "--constraint", str(constraints)]
    command = [sys.executable, "-m", "pip", "install", *options, "torch==0.0.1+cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert any(text in result.stderr for text in set_up.NOT_FOUND)


def test_another_torch_comes_without_the_pins_that_depend_on_torch():
    pins = set_up.CONSTRAINTS.read_text()
    pinned = set_up.pinned_torch(pins)
    for same in ("", pinned, f"{pinned}+cpu"):
        assert set_up.constraints_for(same, pins) == pins
    other = set_up.constraints_for("torch==2.11.0", pins)
    assert set(pins.splitlines()) - set(other.splitlines()) >= {pinned}
    assert "\ntriton==" not in other
    assert "\nsetuptools==" not in other  # torch 2.11 needs an older one
    assert "\ntransformers==" in other


def test_requirements_are_those_of_the_build_the_package_and_the_extras_of_make():
    names = " ".join(set_up.requirements())
    assert all(name in names for name in ("setuptools>=", "torch>=", "transformers>=", "pytest>=", "trl>="))
    assert "flash-attn" not in names


def test_missing_parts_are_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(set_up.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    version = set_up.python_version()
    assert f"apt install python{version}-venv" in set_up.missing_module()
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    assert "install g++ or clang++" in set_up.missing_compiler()
    assert all("\n" not in line for line in (set_up.missing_module(), set_up.missing_compiler(), set_up.CUDA_NOTE))


def test_an_environment_of_another_python_is_kept(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 3.9\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has Python 3\.9, this is Python"):
        set_up.Environment(tmp_path).create()
    assert python.exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_what_to_do_about_python(tmp_path):
    def errors(python):
        command = ["make", "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        return result.stderr.splitlines()

    assert errors("no-such-python")[0].startswith("set-up: no-such-python was not found. Install Python 3.11")
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $2"\n')
    old.chmod(0o755)
    assert errors(old)[0].startswith("set-up: expected Python 3.11 or newer, got 3.10. Name another one")
