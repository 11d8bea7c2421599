"""The tests, as items of `benchmarks.gpu`: kernels compiled ahead, then the tests in several processes at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/ops", "tests/test_triton_launches.py", "tests/test_registration.py"]
SELECTION = "not portable and not csrc"
SANITIZED = "triton and budget and bfloat16"
MOST_PROCESSES = 8  # each has a context on the device, of about half a GiB


def do(op: str, out: Path, descriptor: int) -> dict:
    """The row of an item: `compile`, `run` or `sanitizer`."""
    if op == "compile":
        return {"compiled": compile_ahead(out)}
    if op == "sanitizer":
        return {"compute_sanitizer": sanitize()}
    codes = run_shards(["--fd", str(descriptor)], descriptor)
    return {"statuses": codes}


def processes() -> int:
    return max(min(os.cpu_count() or 1, MOST_PROCESSES), 1)


def run_shards(arguments: list[str], descriptor: int | None = None) -> list[int]:
    """Run the tests in several processes and return their statuses."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-k", SELECTION, "-p", "benchmarks.gpu_pytest"]
    command += ["-p", "no:cacheprovider"]
    count = processes()
    started = [
        subprocess.Popen(
            [*command, "--shard", f"{shard}/{count}", *(x.replace("SHARD", str(shard)) for x in arguments)],
            cwd=ROOT, pass_fds=[] if descriptor is None else [descriptor], stdin=subprocess.DEVNULL,
        )
        for shard in range(count)
    ]  # fmt: skip
    return [process.wait() for process in started]


def compile_ahead(out: Path) -> dict:
    """Record what the tests launch, then compile it in parallel."""
    from benchmarks import ahead

    run_shards(["--record", str(out / "launches-SHARD.json")])
    launches: dict[ahead.Launch, None] = {}
    for path in sorted(out.glob("launches-*.json")):
        launches |= dict.fromkeys(ahead.Launch(*fields) for fields in json.loads(path.read_text()))
        path.unlink()
    return ahead.summary(list(launches))


def sanitize() -> int | str:
    """The status of a few tests under compute-sanitizer, 9 if it found an error."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return "not installed"
    few = [sys.executable, "-m", "pytest", "tests/ops", "-k", SANITIZED]
    return subprocess.run([sanitizer, "--error-exitcode", "9", *few], cwd=ROOT, check=False).returncode
