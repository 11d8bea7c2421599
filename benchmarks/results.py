"""Result files. They are written after every measurement, so that an interrupted run can resume."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import torch

import cwdpo_kernels as ck
from benchmarks import peers

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"
CODE = ["cwdpo_kernels", "csrc", "trainer", "benchmarks/*.py"]


def path_of(suite: str, folder: Path = FOLDER) -> Path:
    return folder / f"{suite}_cpu.json"


def load(suite: str, folder: Path = FOLDER) -> dict:
    return json.loads(path_of(suite, folder).read_text())


class ResultFile:
    """A file {"environment": ..., "measurements": [{"name", "commit", ...}]}. `resume` keeps its measurements.

    Raises SystemExit if `resume` finds measurements of another machine or with other versions.
    """

    def __init__(self, path: Path, environment: dict, resume: bool) -> None:
        self.path, self.environment = path, environment
        self.measurements: dict[str, dict] = {}
        if resume and path.exists():
            stored = json.loads(path.read_text())
            if stored["environment"] != environment:
                raise SystemExit(
                    f"{path}: expected environment to have value {stored['environment']}, got {environment}: "
                    "a file holds the results of one machine; run without --resume and --only to measure all of it"
                )
            self.measurements = {entry["name"]: entry for entry in stored["measurements"]}

    def has(self, name: str, commit: str) -> bool:
        """Whether the file has a measurement of that commit."""
        return self.measurements.get(name, {}).get("commit") == commit

    def put(self, name: str, commit: str, measured: dict) -> None:
        """Add a measurement and write the file."""
        self.measurements[name] = {"name": name, "commit": commit, **measured}
        report = {"environment": self.environment, "measurements": list(self.measurements.values())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(self.path)


def check_build(package: Path = ROOT / "cwdpo_kernels", sources: Path = ROOT / "csrc") -> None:
    """Raise SystemExit if the C++ library is older than its sources: results would be stored under the wrong commit."""
    newest = max(path.stat().st_mtime for path in sources.rglob("*") if path.suffix in (".cpp", ".h"))
    for library in package.glob("libcwdpo_cpu*"):
        if library.stat().st_mtime < newest:
            raise SystemExit(f"{library}: expected a library newer than csrc, got an older one: rebuild it (`make`)")


def commit() -> str:
    """HEAD, with "+changes" if the code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *CODE) else "")


def environment() -> dict:
    """The machine, the versions, and the peers that cannot run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.processor())
    return {
        "device": f"CPU, {cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "backend": ck.backend("cpu"),
        "python": platform.python_version(),
        "cwdpo_kernels": ck.__version__,
        "versions": peers.versions(),
        "cannot_run_here": peers.cannot_run("cpu"),
    }
