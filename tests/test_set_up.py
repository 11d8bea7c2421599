"""The set-up of `make`: which torch it takes, and what it says when something is wrong. Nothing is downloaded."""

import importlib.util
import os
import runpy
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
CPU_BUILD, FROM_INDEX, FROM_PYPI = set_up.torch_sources((), PIN, cpu_only=True)


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
    [source] = set_up.torch_sources((), PIN, cpu_only=False)
    assert arguments(source) == [PIN]
    [source] = set_up.torch_sources(("torch==9.8.0+cpu", "triton==3.3.0"), PIN, cpu_only=True)
    assert arguments(source) == ["torch==9.8.0+cpu", "triton==3.3.0"]
    pip[1].append(NOT_FOUND)
    with pytest.raises(
        SystemExit, match=r"^set-up: pip found no torch==9\.8\.0\+cpu triton==3\.3\.0 for Python .*TORCH"
    ):
        install([source])


def test_a_conflict_between_requested_versions_is_shown(pip):
    conflict = "ERROR: Cannot install torch==9.8.0 and triton==1.0 because these package versions have conflicting"
    pip[1].append(conflict)
    with pytest.raises(SystemExit, match=r"torch==9\.8\.0 and triton==1\.0"):
        install(set_up.torch_sources(("torch==9.8.0", "triton==1.0"), PIN, cpu_only=True))


@pytest.mark.parametrize("constraint", ["numpy>0", "torch<9"])
def test_pip_says_not_found_in_the_words_that_are_looked_for(tmp_path, constraint):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(constraint)
    options = ["--no-index", "--dry-run", "--no-deps", "--constraint", str(constraints)]
    command = [sys.executable, "-m", "pip", "install", *options, "torch==0.0.1+cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert set_up.NOT_FOUND.search(result.stderr)


def test_without_network_the_set_up_stops_with_one_line(monkeypatch):
    """Asks a port of this machine that nothing listens on; pip then retries once, not five times."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    environment = set_up.Environment(Path("venv"))
    environment.python = Path(sys.executable)
    with pytest.raises(SystemExit) as stopped:
        environment.pip("torch", "--dry-run", "--ignore-installed", "torch==0.0.1", accept=set_up.NOT_FOUND)
    message = stopped.value.code
    assert message.startswith("set-up: pip cannot reach a package index: NewConnectionError(")
    assert "Connection refused" in message
    assert message.endswith("run the same command again")
    assert "\n" not in message
    assert "<" not in message  # no repr of pip's objects


def test_a_retry_that_helped_is_no_missing_network():
    assert not set_up.unreachable("Retry(total=4, connect=None)) after connection broken by 'TimeoutError()': /torch")


def test_another_torch_comes_without_the_pins_that_depend_on_torch():
    pins = set_up.CONSTRAINTS.read_text()
    pinned = set_up.pinned_torch(pins)
    for same in ((), (pinned,), (f"{pinned}+cpu",)):
        assert set_up.constraints_for(same, pins) == pins
    assert set_up.constraints_for((f"{pinned}.post1",), pins) != pins
    other = set_up.constraints_for(("torch==2.11.0",), pins)
    assert set(pins.splitlines()) - set(other.splitlines()) >= {pinned}
    assert "\ntriton==" not in other
    assert "\nsetuptools==" not in other  # torch 2.11 needs an older one
    assert "\ntransformers==" in other


@pytest.mark.parametrize(
    ("triton", "expected"), [("3.6.0", "numpy<2.4"), ("3.7.1", "numpy=="), ("3.10.0+git1", "numpy=="), ("", "numpy==")]
)
def test_an_old_triton_comes_with_a_numpy_that_its_interpreter_can_use(triton, expected):
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    found = set_up.constraints_with(triton, "\n".join(pins)).splitlines()
    (changed,) = (line for line in found if line.startswith("numpy"))
    assert changed.startswith(expected)
    assert [line for line in found if line != changed] == [line for line in pins if not line.startswith("numpy")]


def test_requirements_are_those_of_the_build_the_package_and_the_extras_of_make():
    names = " ".join(set_up.requirements())
    assert all(name in names for name in ("setuptools>=", "torch>=", "transformers>=", "pytest>=", "trl>="))
    assert "flash-attn" not in names


def test_missing_parts_are_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(set_up.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    version = set_up.python_version()
    assert f"apt install python{version}-venv" in set_up.missing_module()
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    assert "install g++ or clang++, then run `make rebuild`" in set_up.missing_compiler()
    assert all("\n" not in line for line in (set_up.missing_module(), set_up.missing_compiler(), set_up.CUDA_NOTE))


def test_an_environment_of_another_python_is_kept(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 3.9\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has Python 3\.9, this is Python"):
        set_up.Environment(tmp_path).create()
    assert python.exists()


@pytest.mark.parametrize("python", ["#!/no/such/python\n", "#!/bin/sh\nexit 1\n", None])
def test_an_environment_whose_python_does_not_start_is_kept(tmp_path, python):
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    if python is None:
        link.symlink_to("/no/such/python")  # what a removed Python leaves
    else:
        link.write_text(python)
        link.chmod(0o755)
    with pytest.raises(SystemExit, match=r"has a Python that does not start: remove it \(rm -r .*VENV="):
        set_up.Environment(tmp_path).create()
    assert os.path.lexists(link)


def test_an_environment_without_pip_gets_one(tmp_path):
    """A set-up that was stopped between the two leaves one."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"""#!/bin/sh
case "$*" in
    "-m pip --version") cat {tmp_path}/pip ;;
    "-m ensurepip "*) echo pip 1.0 > {tmp_path}/pip ;;
    *) echo {set_up.python_version()} ;;
esac
""")
    python.chmod(0o755)
    set_up.Environment(tmp_path).create()
    assert (tmp_path / "pip").read_text() == "pip 1.0\n"


def test_only_a_new_or_empty_folder_counts_as_made_by_make(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "step", lambda title, command: True)
    monkeypatch.setattr(set_up.Environment, "output", lambda self, *arguments: "pip 1.0")

    def made(name):
        set_up.Environment(tmp_path / name).create()
        return (tmp_path / name / set_up.MADE_BY_MAKE).exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "pyvenv.cfg").touch()
    assert made("new")
    assert made("new")  # what an interrupted set-up left
    assert made("empty")
    assert not made("theirs")
    assert f"$(VENV)/{set_up.MADE_BY_MAKE}" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "expected .*file to be a folder, got a file: name another folder"),
        ("file/venv", "file/venv: Not a directory. Name a folder that you can write to"),
        ("folder", "folder has other files and no virtual environment: name another folder"),
    ],
)
def test_odd_folders_are_refused_in_one_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    assert stops(monkeypatch, "--venv", str(tmp_path / name), message=message)
    assert list((tmp_path / "folder").iterdir()) == [tmp_path / "folder" / "thesis.tex"]


def stops(monkeypatch, *options, message):
    """Run the script and return whether it stops with one line. The first command that it runs is interrupted."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(set_up.subprocess, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["set_up.py", *options])
    with pytest.raises((SystemExit, KeyboardInterrupt), match=message) as stopped:
        set_up.main()
    assert stopped.type is SystemExit
    return "\n" not in stopped.value.code.strip()


def test_a_read_only_checkout_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up.os, "access", lambda path, mode: False)
    message = f"{ROOT} is read-only, .*copy the checkout"
    assert stops(monkeypatch, "--venv", str(tmp_path / "venv"), message=message)
    assert stops(monkeypatch, "--venv", str(tmp_path / "venv"), "--docs", message=message)


@pytest.mark.parametrize("options", [(), ("--docs",)])
def test_ctrl_c_stops_in_one_line(tmp_path, monkeypatch, options):
    assert stops(monkeypatch, "--venv", str(tmp_path / "venv"), *options, message="set-up: stopped. The same command")


GOOD = ["torch==2.15.0", "torch==2.11.0+cpu triton==3.6.0", " torch ", "torch>=2.11,<2.14", "torch==2.16.0.dev20261101"]
ODD = [
    "torch==2.15.0'", '"', "2.15.0", "torch 2.15.0", "torch=2.15.0", "torch==", "-r x", "-rx", "--index-url=http://x",
    "a;b", "torch;b", "$(id)", "`id`", "torch==2.15.0 -e .", "torch@http://x", "./torch.whl", "torchvision==0.27",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_torch_is_given_as_requirements(text):
    assert set_up.requested_torch(text) == tuple(text.split())


@pytest.mark.parametrize("text", ODD)
def test_an_odd_torch_is_refused_in_one_line(monkeypatch, text):
    assert stops(monkeypatch, f"--torch={text}", message="set-up: expected TORCH to be like torch==2.15.0")


def test_notes_about_untested_pythons_amd_gpus_and_triton(monkeypatch):
    monkeypatch.setattr(set_up.shutil, "which", lambda name: f"/bin/{name}")
    assert set_up.AMD_NOTE in set_up.notes((), cpu_only=True)
    assert set_up.AMD_NOTE not in set_up.notes((), cpu_only=False)
    assert set_up.TRITON_NOTE in set_up.notes(("torch==2.11.0+cpu",), cpu_only=True)
    assert set_up.TRITON_NOTE not in set_up.notes(("torch==2.11.0+cpu", "triton==3.6.0"), cpu_only=True)
    monkeypatch.setattr(set_up, "python_version", lambda: "3.14")
    assert "Python 3.14 is not tested; 3.11 to 3.13 are (make PYTHON=...)." in set_up.notes((), cpu_only=False)


@pytest.mark.parametrize("text", ["", " ", "'", "no-such-compiler"])
def test_an_odd_compiler_variable_is_no_error(monkeypatch, text):
    monkeypatch.setenv("CXX", text)
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    assert "no C++ compiler found" in set_up.missing_compiler()


def test_an_old_python_is_named():
    code = "import runpy, sys; sys.version_info = (3, 10, 4); runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, ROOT / "tools" / "set_up.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("set-up: expected Python 3.11 to 3.13, got ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["3.11", "3.11:", ":2.11.0", "3.11:2.11.0:x", "3:2", "3.11:2.11", "3.11:torch"])
def test_make_wheel_says_what_an_environment_is(text):
    versions = runpy.run_path(str(ROOT / "tools" / "wheel.py"))["versions"]
    assert versions("3.11:2.11.0") == ("3.11", "2.11.0")
    with pytest.raises(SystemExit, match=rf"^wheel: expected environments like 3\.11:2\.11\.0 .*got '{text}'$"):
        versions(text)
