"""Our steps on 1, 2, 4, ... threads, and what those on one and two predict for more (CPU).

Amdahl's law: n threads take serial + parallel / n seconds, where one takes T1 = serial + parallel and two take T2 =
serial + parallel / 2. So serial = 2 T2 - T1, whose quartiles bound the prediction. On a machine with more threads the
measured times stand beside the predicted ones.

Two threads are also timed on one core, where a busy system often puts them: each parallel region, ours or torch's, then
costs two time slices, because one thread spins while it waits for the other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks import linear, peers, timing
from benchmarks.workloads import ON_A_CPU, Inputs, Workload, by_mode
from cwdpo_kernels.ops import library

PREDICTED = (16, 64)  # threads


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return by_mode(ON_A_CPU, measure)


def measure(workload: Workload, mode: str, repeats: int, call: Callable) -> dict:
    """Seconds and parallel regions of a step by number of threads, and the seconds that they predict."""
    inputs, step = workload.make(mode), peers.implementations()["cwdpo_kernels"].step
    available = len(os.sched_getaffinity(0))
    threads = [2**k for k in range(available.bit_length())]
    steps = {str(n): functools.partial(seconds, n, step, inputs) for n in threads}
    if available > 1:
        steps["2 on one core"] = functools.partial(seconds_on_one_core, 2, step, inputs)
    before = torch.get_num_threads()
    try:
        for one_step in steps.values():  # warm up
            one_step()
        opened = library.parallel_regions()
        seconds(threads[-1], step, inputs)
        regions = library.parallel_regions() - opened
        with timing.others() as others:
            times = timing.interleaved(steps, repeats, enough=float("inf"))
    finally:
        torch.set_num_threads(before)
    return {
        "workload": workload.record(), "mode": mode, "others": others(), "regions": regions,
        "threads": {n: timing.summary(values) for n, values in times.items()},
        **(prediction(times["1"], times["2"]) if "2" in times else {}),
    }  # fmt: skip


def seconds(threads: int, step: Callable, inputs: Inputs) -> float:
    torch.set_num_threads(threads)
    return linear.step_seconds(step, inputs)


def seconds_on_one_core(threads: int, step: Callable, inputs: Inputs) -> float:
    with on_one_core():
        return seconds(threads, step, inputs)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Keep all threads of this process on one core (Linux). OpenMP has counted the cores before, so it still spins."""
    cores = os.sched_getaffinity(0)
    try:
        move_threads({min(cores)})
        yield
    finally:
        move_threads(cores)


def move_threads(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)


def prediction(one: list[float], two: list[float]) -> dict:
    """Quartiles of the serial part, and of the time on more threads that follow from them, in seconds."""
    serial = [max(2 * t2 - t1, 0.0) for t1, t2 in zip(one, two, strict=True)]
    quartiles, whole = statistics.quantiles(serial, n=4, method="inclusive"), statistics.median(one)
    return {
        "serial_seconds": quartiles,
        "predicted_seconds": {str(n): [part + (whole - part) / n for part in quartiles] for n in PREDICTED},
    }
