"""Create the virtual environment that `make` uses: torch, the pinned packages, and this package with its C++ library.

    python tools/set_up.py --venv .venv [--torch "torch==2.15.0"]
    python tools/set_up.py --venv build/docs --docs     # only what `make docs` needs

Prints one line per step. A failure is one line that says what happened and what to do, after the command's output if
the cause is in there. The compiler's output is in VENV/build.log.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

if sys.version_info < (3, 11):  # noqa: UP036 - before an import that 3.10 does not have
    sys.exit(f"set-up: expected Python 3.11 to 3.13, got {platform.python_version()}. Run it with another one")
import tomllib

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LIBRARY = ROOT / "cwdpo_kernels" / "libcwdpo_cpu.so"
EXTRAS = ("trainer", "bench", "dev")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # https://pytorch.org/get-started/locally
FAIL_FAST = ("--timeout", "10", "--retries", "0")
TESTED = ("3.11", "3.12", "3.13")  # Python versions
MADE_BY_MAKE = "made-by-make"  # a file in an environment that `make clean` may remove
# What pip says if it finds no such torch; the second one if a constraint mentions torch.
NOT_FOUND = re.compile(r"No matching distribution found for torch(?![\w-])|Cannot install torch(?![\w-])\S* because")
UNREACHABLE = (
    "pip cannot reach a package index: {}. Connect to the network, or set PIP_INDEX_URL or PIP_FIND_LINKS to a source "
    "that this machine reaches; then run the same command again"
)
LAST_RETRY = re.compile(r"Retry\(total=0,.* after connection broken by '?(.*?)'?: /")
REQUIREMENT = re.compile(r"([A-Za-z][\w.-]*)((==|~=|!=|>=|<=|>|<)\d[\w.+!*]*(,(==|~=|!=|>=|<=|>|<)\d[\w.+!*]*)*)?")
CUDA_NOTE = (
    "found no CPU build of torch. PyPI's wheel brings the CUDA libraries: 2.7 GB to download, 6.0 GB on disk. To avoid "
    "that, stop here (Ctrl-C) and set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a source that has CPU builds."
)
AMD_NOTE = (
    "found an AMD GPU, but make installs a CPU build of torch. To use the GPU, install PyTorch for ROCm into an "
    "environment of your own (https://pytorch.org/get-started/locally) and run `make gpu PYTHON=THAT/bin/python`."
)
TRITON_NOTE = (
    "a CPU build of torch does not say which Triton it works with, so pip takes the newest. To choose, name it too: "
    'TORCH="torch==2.11.0+cpu triton==3.6.0"'
)


@dataclass(frozen=True)
class TorchSource:
    """One way to get torch: what to install, its name in the output, options for pip, and a note to print first."""

    requirements: tuple[str, ...]
    title: str
    options: tuple[str, ...] = ()
    note: str | None = None


def stop(message: str) -> NoReturn:
    sys.exit(f"set-up: {message}")


def requested_torch(text: str) -> tuple[str, ...]:
    """The words of TORCH. They reach pip, so only NAME and NAME==VERSION (or another comparison) may pass."""
    words = tuple(text.split())
    parsed = [REQUIREMENT.fullmatch(word) for word in words]
    if words and not (all(parsed) and any(match and match[1] == "torch" for match in parsed)):
        stop(f'expected TORCH to be like torch==2.15.0 or "torch==2.11.0+cpu triton==3.6.0", got {text!r}')
    return words


def torch_sources(requested: tuple[str, ...], pinned: str, cpu_only: bool) -> list[TorchSource]:
    """The sources to try in order. `requested` is the user's own choice and has no alternative."""
    if requested:
        return [TorchSource(requested, " ".join(requested))]
    if not cpu_only:
        return [TorchSource((pinned,), f"{pinned} with its CUDA libraries (2.7 GB; minutes)")]
    # The local version keeps pip from taking the CUDA build. The index has few other packages: the dependencies of
    # torch come with the next step.
    cpu_build = f"{pinned}+cpu"
    from_index = ("--no-deps", "--index-url", CPU_INDEX, *FAIL_FAST)
    return [
        TorchSource((cpu_build,), f"{cpu_build} (190 MB)"),
        TorchSource((cpu_build,), f"{cpu_build} from {CPU_INDEX} (190 MB)", from_index),
        TorchSource((pinned,), f"{pinned} from PyPI (2.7 GB; minutes)", note=CUDA_NOTE),
    ]


def pinned_torch(constraints: str) -> str:
    found = re.search(r"^torch==\S+", constraints, re.MULTILINE)
    if found is None:
        stop("expected constraints.txt to pin torch, got no line torch==...")
    return found[0]


def constraints_for(requested: tuple[str, ...], constraints: str) -> str:
    """The constraints, without what depends on torch's version if the user asked for another torch."""
    if not requested or pinned_torch(constraints) in (word.split("+")[0] for word in requested):
        return constraints
    return re.sub(r"^(torch|triton|setuptools)==.*\n", "", constraints, flags=re.MULTILINE)


def constraints_with(triton: str, constraints: str) -> str:
    """The constraints beside the installed Triton: before 3.7, its interpreter needs numpy before 2.4."""
    if not triton or tuple(map(int, triton.split(".")[:2])) >= (3, 7):
        return constraints
    return re.sub(r"^numpy==.*", "numpy<2.4", constraints, flags=re.MULTILINE)


def notes(requested: tuple[str, ...], cpu_only: bool) -> list[str]:
    """What the user should know before the set-up starts."""
    lines = []
    if python_version() not in TESTED:
        lines.append(f"Python {python_version()} is not tested; {TESTED[0]} to {TESTED[-1]} are (make PYTHON=...).")
    if cpu_only and not requested and (Path("/dev/kfd").exists() or shutil.which("rocminfo")):
        lines.append(AMD_NOTE)
    if any("+cpu" in word for word in requested) and not any(word.startswith("triton") for word in requested):
        lines.append(TRITON_NOTE)
    if missing := missing_compiler():
        lines.append(missing)
    return lines


def requirements() -> list[str]:
    """What the build, the package and the extras of `make` need, from pyproject.toml."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return document["build-system"]["requires"] + project["dependencies"] + extras


def docs_requirements() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def missing_module() -> str | None:
    """What to do if this Python cannot create virtual environments (Debian and Ubuntu ship that part separately)."""
    if all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        return None
    version = python_version()
    return (
        f"Python {version} has no venv module. On Debian or Ubuntu run `apt install python{version}-venv`, "
        "or name another Python: make PYTHON=..."
    )


def missing_compiler() -> str | None:
    """What to do if there is no C++ compiler. Everything works without one, but slower on a CPU."""
    names = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    if any(shutil.which(name.split()[0]) for name in names if name and name.strip()):
        return None
    return (
        "no C++ compiler found, so CPU ops will be slower. For the fast ones install g++ or clang++, "
        "then run `make rebuild`."
    )


def say(line: str) -> None:
    print(f"set-up: {line}", flush=True)


class Environment:
    """The virtual environment, and how to run commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self) -> None:
        """Create it, or keep an existing one of the same Python version. Never delete one: it may be the user's own."""
        if os.path.lexists(self.python):  # a link to a Python that is gone counts
            self.require_this_python()
        else:
            self.require_free_folder()
            title = f"virtual environment {self.folder} (Python {python_version()})"
            step(title, [sys.executable, "-m", "venv", str(self.folder)])
        if not self.output("-m", "pip", "--version"):  # an earlier set-up was interrupted here
            step("pip", [str(self.python), "-m", "ensurepip", "--upgrade", "--default-pip"])

    def require_this_python(self) -> None:
        wanted, found = python_version(), self.output("-c", "import sys; print('%d.%d' % sys.version_info[:2])")
        if found != wanted:
            state = f"has Python {found}, this is Python {wanted}" if found else "has a Python that does not start"
            stop(f"{self.folder} {state}: remove it (rm -r {self.folder}) or name another folder (make VENV=...)")

    def require_free_folder(self) -> None:
        """An empty folder, marked as made here, or what an interrupted set-up left."""
        if self.folder.exists() and not self.folder.is_dir():
            stop(f"expected {self.folder} to be a folder, got a file: name another folder (make VENV=...)")
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / MADE_BY_MAKE
        if not any(self.folder.iterdir()):
            marker.touch()
        elif not (marker.exists() or (self.folder / "pyvenv.cfg").exists()):
            stop(f"{self.folder} has other files and no virtual environment: name another folder (make VENV=...)")

    def output(self, *arguments: str) -> str:
        """What the environment's Python prints; empty if it fails."""
        try:
            result = subprocess.run([str(self.python), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return "" if result.returncode else result.stdout.strip()

    def pip(self, title: str, *arguments: str, accept: re.Pattern[str] | None = None) -> bool:
        """Run `pip install`, see `step`."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        return step(title, command, accept)


def unreachable(output: str) -> str | None:
    """Why pip could not connect, in its words, if it used up its retries."""
    broken = LAST_RETRY.search(output)
    return re.sub(r"<[^>]*>:? ?", "", broken[1]) if broken else None


def step(title: str, command: list[str], accept: re.Pattern[str] | None = None) -> bool:
    """Run a command silently. Return False if its output matches `accept`; any other failure ends the set-up."""
    print(f"set-up: {title} ... ", end="", flush=True)
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = f"{time.monotonic() - start:.0f} s"
    if not result.returncode:
        print(f"done ({seconds})", flush=True)
        return True
    if reason := unreachable(result.stdout):
        print(f"failed ({seconds})", flush=True)
        stop(UNREACHABLE.format(reason))
    if accept and accept.search(result.stdout):
        print(f"not found ({seconds})", flush=True)
        return False
    print(f"failed ({seconds})", flush=True)
    sys.exit(f"{result.stdout}\nset-up: failed: {shlex.join(command)}")


def install_torch(environment: Environment, sources: Iterable[TorchSource], constraints: Path) -> None:
    """Install torch from the first source that has it. Only "not found" leads to the next one."""
    for source in sources:
        if source.note:
            say(source.note)
        arguments = ("--constraint", str(constraints), *source.options, *source.requirements)
        if environment.pip(source.title, *arguments, accept=NOT_FOUND):
            return
    stop(
        f"pip found no {' '.join(source.requirements)} for Python {python_version()} on this machine, or a constraint "
        "in pip's configuration excludes it. Name another torch (make TORCH=...), or set PIP_FIND_LINKS or "
        "PIP_EXTRA_INDEX_URL to a source that has it"
    )


def library_is_current() -> bool:
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return LIBRARY.exists() and LIBRARY.stat().st_mtime >= newest


def require_writable_checkout() -> None:
    for folder in (ROOT, LIBRARY.parent):
        if not os.access(folder, os.W_OK):
            stop(f"{folder} is read-only, and make builds in it: copy the checkout to a folder that you can write to")


def set_up(environment: Environment, torch: tuple[str, ...]) -> None:
    cpu_only = platform.system() == "Linux" and shutil.which("nvidia-smi") is None
    for note in notes(torch, cpu_only):
        say(note)
    environment.create()
    for mark in environment.folder.glob("ready*"):  # of an earlier set-up, perhaps with another torch
        mark.unlink()
    pins = CONSTRAINTS.read_text()
    constraints = environment.folder / "constraints.txt"
    constraints.write_text(constraints_for(torch, pins))
    install_torch(environment, torch_sources(torch, pinned_torch(pins), cpu_only), constraints)
    triton = environment.output("-c", "from importlib.metadata import version; print(version('triton'))")
    constraints.write_text(constraints_with(triton, constraints.read_text()))
    environment.pip("the pinned packages (up to 550 MB)", "--constraint", str(constraints), *requirements())
    log = environment.folder / "build.log"
    this_package = ("--log", str(log), "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    environment.pip("cwdpo_kernels and its C++ library (a minute or two)", *this_package)
    if not missing_compiler() and not library_is_current():
        say(f"the C++ library did not build, so CPU ops will be slower. {log} has the compiler's messages.")


def set_up_docs(environment: Environment) -> None:
    environment.create()
    environment.pip("mkdocs and its theme (40 MB)", "--constraint", str(CONSTRAINTS), *docs_requirements())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the virtual environment")
    parser.add_argument("--torch", default="", help="requirements for torch, separated by spaces (default: pinned)")
    parser.add_argument("--docs", action="store_true", help="install what builds the documentation, nothing else")
    options = parser.parse_args()
    torch = requested_torch(options.torch)
    if problem := missing_module():
        stop(problem)
    require_writable_checkout()
    environment = Environment(options.venv)
    try:
        if options.docs:
            set_up_docs(environment)
        else:
            set_up(environment, torch)
    except KeyboardInterrupt:
        sys.exit("\nset-up: stopped. The same command continues it")
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}. Name a folder that you can write to (make VENV=...)")


if __name__ == "__main__":
    main()
