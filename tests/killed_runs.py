"""Simulated runs of `benchmarks.gpu` that are killed: what must be kept."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import gpu_file

ROOT = Path(__file__).parents[1]
SIMULATION = ROOT / "tests" / "simulated_gpu.py"


@contextlib.contextmanager
def running(out, *options, module="gpu", stderr=None, **environment):
    """A simulated run. Whatever happens, neither it nor its children outlive the block."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--out", str(out), "--simulate", str(SIMULATION)]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_of(out):
    """The processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(out).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def rows(out):
    """The data of a run, and the result of each row by what identifies it. (`of_limit` may be added later.)"""
    data = json.loads((out / "gpu.json").read_text())
    found = {
        (kind, *(row[key] for key in keys)): row.get("ms", row.get("error"))
        for kind, keys in gpu_file.KEYS.items()
        for row in data.get(kind, [])
    }
    return data, found


def kill_and_resume(out, kills, seed, *options):
    """Kill a run `kills` times, each time after a random number of lines, then let it finish. Returns its data."""
    choice = random.Random(seed)
    before, done = {}, []
    for _ in range(kills):
        with running(out, "--resume", *options) as process:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if choice.random() < 0.15:
                    break
            time.sleep(choice.random() * 0.02)
            os.kill(process.pid, signal.SIGKILL)
            rest = process.stdout.read().splitlines()
        data, now = rows(out)
        written = {line.rstrip() for line in [*printed, *rest] if line.rstrip().endswith("GiB") or ", eager " in line}
        texts = gpu_file.TEXTS.items()  # a row is saved, then printed
        assert written <= {text(row).rstrip() for kind, text in texts for row in data.get(kind, ())}
        check_kept(before, now, done)
        before, done = now, data["done"]
        end = time.monotonic() + 60
        while processes_of(out) and time.monotonic() < end:
            time.sleep(0.05)
        assert not processes_of(out), "a child outlived the run"
    with running(out, "--resume", *options) as process:
        assert process.wait(600) == 0
    data, now = rows(out)
    check_kept(before, now, done)
    return data


def check_kept(before, now, done):
    """All rows are kept, and those of finished items as they were. An item that was cut is measured again."""
    assert before.keys() <= now.keys()
    for kind, *keys in before:
        names = {"values": f"values, {keys[0]}", "shared": f"shared prompts, {keys[0]}"}
        item = names.get(kind, ", ".join(keys))
        assert now[kind, *keys] == before[kind, *keys] or item not in done
