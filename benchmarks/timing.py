"""Interleaved repetitions, their medians and quartiles, and the limits measured in the same run."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

# A step is not repeated further once it has run ENOUGH_SECONDS in total and MIN_REPEATS times. A step that takes
# VERY_LONG_SECONDS runs once.
ENOUGH_SECONDS, MIN_REPEATS, VERY_LONG_SECONDS = 3.0, 2, 10.0
TILE = 1024  # columns of a vocabulary tile


def seconds(function: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Callable[[], float]], repeats: int, enough: float = ENOUGH_SECONDS
) -> dict[str, list[float]]:
    """Repeat all steps in turn, so that a slow phase of the machine affects all of them. Each step returns its time.

    `enough`: seconds of a step after which it is not repeated any more.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name, step in steps.items():
            spent = sum(times[name])
            if spent < enough or (repeat < MIN_REPEATS and spent < VERY_LONG_SECONDS):
                times[name].append(step())
    return times


@contextlib.contextmanager
def others() -> Iterator[Callable[[], float]]:
    """Yield a function that returns, after the block, the share of CPU time used by other processes (Linux)."""

    def now() -> tuple[float, float, float]:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        idle = int(ticks[3]) + int(ticks[4])  # idle, iowait
        return sum(map(int, ticks)), idle, time.process_time() * os.sysconf("SC_CLK_TCK")

    start: tuple[float, float, float] = now()
    end: list[tuple[float, float, float]] = []
    yield lambda: _share_of_others(*(b - a for a, b in zip(start, end[0], strict=True)))
    end.append(now())


def _share_of_others(ticks: float, idle: float, own: float) -> float:
    return max(ticks - idle - own, 0.0) / max(ticks, 1.0)


def summary(times: list[float]) -> dict:
    """The times, their median and their quartiles."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"seconds": times, "median_seconds": middle, "quartiles": [low, high]}


def against_best_peer(medians: dict[str, float], ours: set[str]) -> dict[str, float]:
    """The times of ours divided by that of the fastest peer; empty without a peer."""
    peers = [median for name, median in medians.items() if name not in ours]
    return {name: medians[name] / min(peers) for name in medians if name in ours} if peers else {}


def products(rows: int, dim: int, vocab: int, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Steps that return the time of torch.mm for each product over the whole vocabulary, in tiles like ours."""
    tiles = 8
    hidden, logits = torch.randn(rows, dim, dtype=dtype), torch.randn(TILE, rows, dtype=dtype)
    weight, grad_hidden = torch.randn(tiles * TILE, dim, dtype=dtype), torch.zeros(rows, dim, dtype=dtype)
    out = torch.zeros_like(weight)
    of_tile: dict[str, Callable[[slice], Tensor]] = {
        "logits": lambda tile: torch.mm(weight[tile], hidden.T, out=logits),
        "grad_hidden": lambda tile: torch.addmm(grad_hidden, logits.T, weight[tile], out=grad_hidden),
        "grad_weight": lambda tile: torch.mm(logits, hidden, out=out[tile]),
    }

    def step(product: Callable[[slice], Tensor]) -> float:
        start = time.perf_counter()
        for i in range(tiles):
            product(slice(i * TILE, (i + 1) * TILE))
        return (time.perf_counter() - start) * vocab / (tiles * TILE)

    return {name: functools.partial(step, product) for name, product in of_tile.items()}


def copy_bytes_per_second(size: int = 1 << 28, repeats: int = 5) -> float:
    """The rate of a copy in memory: bytes read plus bytes written, per second."""
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repeats))
