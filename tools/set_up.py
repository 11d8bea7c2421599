"""Create the virtual environment that `make` uses: torch, the pinned packages, and this package with its C++ library.

    python tools/set_up.py --venv .venv [--torch "torch==2.15.0"]

Prints one line per step; pip's output is shown only if a step fails. The compiler's output is in VENV/build.log.
Needs Python 3.11.
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
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
LIBRARY = ROOT / "cwdpo_kernels" / "libcwdpo_cpu.so"
EXTRAS = ("trainer", "bench", "dev")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # https://pytorch.org/get-started/locally
FAIL_FAST = ("--timeout", "10", "--retries", "0")
# What pip says if it finds no such torch; the second one if a constraint mentions torch.
NOT_FOUND = ("No matching distribution found for torch", "ResolutionImpossible")
CUDA_NOTE = (
    "found no CPU build of torch. PyPI's wheel brings the CUDA libraries: 2.7 GB to download, 6.0 GB on disk. To avoid "
    "that, stop here (Ctrl-C) and set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a source that has CPU builds."
)


@dataclass(frozen=True)
class TorchSource:
    """One way to get torch: what to install, its name in the output, options for pip, and a note to print first."""

    requirements: tuple[str, ...]
    title: str
    options: tuple[str, ...] = ()
    note: str | None = None


def torch_sources(requested: str, pinned: str, cpu_only: bool) -> list[TorchSource]:
    """The sources to try in order. `requested` is the user's own choice and has no alternative."""
    if requested:
        return [TorchSource(tuple(shlex.split(requested)), requested)]
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
        sys.exit("set-up: expected constraints.txt to pin torch, got no line torch==...")
    return found[0]


def constraints_for(requested: str, constraints: str) -> str:
    """The constraints, without what depends on torch's version if the user asked for another torch."""
    if not requested or pinned_torch(constraints) in requested:
        return constraints
    return re.sub(r"^(torch|triton|setuptools)==.*\n", "", constraints, flags=re.MULTILINE)


def requirements() -> list[str]:
    """What the build, the package and the extras of `make` need, from pyproject.toml."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return document["build-system"]["requires"] + project["dependencies"] + extras


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
    if any(shutil.which(shlex.split(name)[0]) for name in names if name):
        return None
    return (
        "no C++ compiler found, so CPU ops will be slower. For the fast ones install g++ or clang++, "
        "then run `make clean` and this command again."
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
        wanted = python_version()
        if not self.python.exists():
            step(
                f"virtual environment {self.folder} (Python {wanted})", [sys.executable, "-m", "venv", str(self.folder)]
            )
            return
        command = [str(self.python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found != wanted:
            advice = f"remove it (rm -r {self.folder}) or name another folder (make VENV=...)"
            sys.exit(f"set-up: {self.folder} has Python {found or '?'}, this is Python {wanted}: {advice}")

    def pip(self, title: str, *arguments: str, accept: tuple[str, ...] = ()) -> bool:
        """Run `pip install`. Return False if it fails with a text of `accept`; any other failure ends the set-up."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        return step(title, command, accept)


def step(title: str, command: list[str], accept: tuple[str, ...] = ()) -> bool:
    """Run a command silently. Return False if it fails with a text of `accept`; any other failure ends the set-up."""
    print(f"set-up: {title} ... ", end="", flush=True)
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = f"{time.monotonic() - start:.0f} s"
    if result.returncode and any(text in result.stdout for text in accept):
        print(f"not found ({seconds})", flush=True)
        return False
    if result.returncode:
        print(f"failed ({seconds})", flush=True)
        sys.exit(f"{result.stdout}\nset-up: failed: {shlex.join(command)}")
    print(f"done ({seconds})", flush=True)
    return True


def install_torch(environment: Environment, sources: Iterable[TorchSource], constraints: Path) -> None:
    """Install torch from the first source that has it. Only "not found" leads to the next one."""
    *others, last = sources
    for source in (*others, last):
        if source.note:
            say(source.note)
        arguments = ("--constraint", str(constraints), *source.options, *source.requirements)
        if environment.pip(source.title, *arguments, accept=() if source is last else NOT_FOUND):
            return


def library_is_current() -> bool:
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    return LIBRARY.exists() and LIBRARY.stat().st_mtime >= newest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder of the virtual environment")
    parser.add_argument("--torch", default="", help="requirements for torch, separated by spaces (default: pinned)")
    options = parser.parse_args()
    if problem := missing_module():
        sys.exit(f"set-up: {problem}")
    no_compiler = missing_compiler()
    if no_compiler:
        say(no_compiler)

    environment = Environment(options.venv)
    environment.create()
    pins = CONSTRAINTS.read_text()
    constraints = environment.folder / "constraints.txt"
    constraints.write_text(constraints_for(options.torch, pins))
    cpu_only = platform.system() == "Linux" and shutil.which("nvidia-smi") is None
    install_torch(environment, torch_sources(options.torch, pinned_torch(pins), cpu_only), constraints)
    environment.pip("the pinned packages (up to 550 MB)", "--constraint", str(constraints), *requirements())
    log = environment.folder / "build.log"
    this_package = ("--log", str(log), "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    environment.pip("cwdpo_kernels and its C++ library (a minute or two)", *this_package)
    if not no_compiler and not library_is_current():
        say(f"the C++ library did not build, so CPU ops will be slower. {log} has the compiler's messages.")


if __name__ == "__main__":
    main()
