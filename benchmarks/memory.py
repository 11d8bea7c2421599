"""Peak resident memory of one step, over its inputs and gradients, in a process of its own.

`python -m benchmarks.memory WORKLOAD IMPLEMENTATION` prints the bytes.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.workloads import WORKLOADS, implementations


def extra_bytes(workload: str, implementation: str) -> int:
    """Measured in a fresh process: an allocator that has grown before would hide the peak."""
    command = [sys.executable, "-m", "benchmarks.memory", workload, implementation]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def _measure(name: str, implementation: str) -> int:
    workload = next(x for x in WORKLOADS if x.name == name)
    step = implementations()[implementation].step
    # Threads, BLAS, autograd and compilers take their own memory once: let them, on small copies of the workload
    # (two sizes: a compiler makes its code for any size at the second).
    for size in (8, 16):
        step(*replace(workload, tokens=2 * size, response=size, vocab=2048 + size).make()).backward()

    hidden, head, labels, refs = workload.make()
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs has left in the allocator would be reused unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak (VmHWM) to the present
    step(hidden, head, labels, refs).backward()
    gradients = [x.grad for x in (hidden, head.weight) if x.grad is not None]
    return _status("VmHWM") - before - sum(x.numel() * x.itemsize for x in gradients)


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
