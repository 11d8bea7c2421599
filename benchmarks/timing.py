"""Interleaved repetitions, their medians and spread, and the limits measured beside them."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# What has taken so long in all is not repeated more, if it was done so often; what takes very long is done once.
ENOUGH_SECONDS, FEWEST, VERY_LONG_SECONDS = 3.0, 2, 10.0
TILE = 1024  # columns of a vocabulary tile


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each step returns its own seconds. All of them in turn, so that a slow phase of the machine hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats):
        for name, step in steps.items():
            spent = sum(times[name])
            if spent < ENOUGH_SECONDS or (repeat < FEWEST and spent < VERY_LONG_SECONDS):
                times[name].append(step())
    return times


@contextlib.contextmanager
def others() -> Iterator[Callable[[], float]]:
    """Yields a function that says, afterwards, which share of the CPUs' time other processes took (Linux)."""

    def now() -> tuple[float, float, float]:
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        idle = sum(int(ticks[place]) for place in (3, 4))
        return sum(map(int, ticks)), idle, time.process_time() * os.sysconf("SC_CLK_TCK")

    start, end = now(), []
    yield lambda: _share_of_others(*(b - a for a, b in zip(start, end[0], strict=True)))
    end.append(now())


def _share_of_others(ticks: float, idle: float, own: float) -> float:
    return max(ticks - idle - own, 0.0) / max(ticks, 1.0)


def summary(times: list[float]) -> dict:
    """All of them, their median and their quartiles."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"seconds": times, "median_seconds": middle, "quartiles": [low, high]}


def against_best_peer(medians: dict[str, float], ours: set[str]) -> dict[str, float]:
    """Of ours, the ratio to the fastest peer: below 1 is faster than it. Empty without a peer."""
    peers = [median for name, median in medians.items() if name not in ours]
    return {name: medians[name] / min(peers) for name in medians if name in ours} if peers else {}


def products(rows: int, dim: int, vocab: int, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Steps that give what torch.mm takes for each product of a whole vocabulary, on tiles as ours has them."""
    tiles = 8
    hidden, logits = torch.randn(rows, dim, dtype=dtype), torch.randn(TILE, rows, dtype=dtype)
    weight, grad_hidden = torch.randn(tiles * TILE, dim, dtype=dtype), torch.zeros(rows, dim, dtype=dtype)
    out = torch.zeros_like(weight)
    of_tile = {
        "logits": lambda tile: torch.mm(weight[tile], hidden.T, out=logits),
        "grad_hidden": lambda tile: torch.addmm(grad_hidden, logits.T, weight[tile], out=grad_hidden),
        "grad_weight": lambda tile: torch.mm(logits, hidden, out=out[tile]),
    }

    def step(product: Callable) -> float:
        start = time.perf_counter()
        for i in range(tiles):
            product(slice(i * TILE, (i + 1) * TILE))
        return (time.perf_counter() - start) * vocab / (tiles * TILE)

    return {name: lambda product=product: step(product) for name, product in of_tile.items()}


def copy_bytes_per_second(size: int = 1 << 28, repeats: int = 5) -> float:
    """Of a copy from memory to memory, read and written bytes counted."""
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repeats))
