"""The steps of the suite `linear` beside two processes that keep two cores busy (CPU).

Machines share their cores: a probe job runs beside a training, tests run beside a build. Threads that wait for one
another in short loops then lose whole time slices. The slowest peers are left out.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks import linear
from benchmarks.workloads import ON_A_CPU, Workload, by_mode

PROCESSES = 2
WITHOUT = (
    "eager, full logits",
    "torch.compile, full logits",
    "torch linear_cross_entropy, chunked",
    "Liger fused linear DPO",
    "TRL chunked log-prob",
    "cwdpo_kernels, none kept",
)


@contextlib.contextmanager
def busy_processes(count: int = PROCESSES) -> Iterator[None]:
    """Run `count` processes that compute without end, for the duration of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return by_mode(ON_A_CPU, measure)


def measure(workload: Workload, mode: str, repeats: int, call: Callable) -> dict:
    measured = linear.measure(workload, mode, repeats, call, WITHOUT, beside=busy_processes)
    return {"busy_processes": PROCESSES, **measured}
