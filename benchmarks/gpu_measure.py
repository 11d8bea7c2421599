"""What the GPU benchmarks share: shapes, timing by CUDA events, and a report that is saved after every row."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cost
from benchmarks.workloads import MODELS

REPEATS, WARM_UP = 9, 3
BUSY_CYCLES = 20_000_000  # about ten milliseconds, longer than the launches of a step take


@dataclass(frozen=True)
class Shape:
    """`tokens`: labeled tokens of all 2P answers."""

    name: str
    tokens: int
    vocab: int
    dim: int

    @classmethod
    def of(cls, model: str, tokens: int) -> Shape:
        return cls(model, tokens, MODELS[model].vocab, MODELS[model].dim)


SHAPES = [
    Shape("trl-issue-7244", 8192, 151936, 4096),  # the issue reports times of the peers on an H100
    Shape.of("Qwen2.5-VL-7B", 4096),
    Shape.of("SmolVLM-256M", 4096),
    Shape.of("Gemma-3-4B", 2048),
]


def linear_inputs(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, D] and weight [V, D] in bfloat16, labels [N]."""
    hidden = torch.randn(shape.tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(shape.vocab, shape.dim, dtype=torch.bfloat16) * shape.dim**-0.5).requires_grad_()
    return hidden, weight, torch.randint(shape.vocab, (shape.tokens,))


def milliseconds(step: Callable[[], object]) -> float:
    """The time of one call on the GPU, by CUDA events. The GPU is kept busy first, while the step is launched."""
    return both_milliseconds(step)[0]


def both_milliseconds(step: Callable[[], object]) -> tuple[float, float]:
    """The time of one call on the GPU, and the time that the host takes to launch it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY_CYCLES)
    begin = time.perf_counter()
    start.record()
    step()
    end.record()
    host = time.perf_counter() - begin
    end.synchronize()
    return start.elapsed_time(end), host * 1e3


def measure(steps: dict[str, Callable]) -> dict[str, dict]:
    """Median times of interleaved repetitions, and the peak of allocated memory above what was allocated before.

    Unless other work hides it, `host_ms`, the time to launch a step, limits a step that the GPU runs faster than that.
    """
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            times[name].append(both_milliseconds(step))
    results = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        all_ms, host_ms = zip(*times[name], strict=True)
        results[name] = {
            "ms": statistics.median(all_ms), "all_ms": all_ms, "host_ms": statistics.median(host_ms),
            "extra_gib": extra,
        }  # fmt: skip
    return results


class Report:
    """What has been measured so far. Every addition rewrites the file and prints a line."""

    def __init__(self, path: Path, budget_seconds: float = math.inf, **head: object) -> None:
        self.path, self.end = path, time.monotonic() + budget_seconds
        self.data: dict = {**head, "values": [], "limits": {}, "measurements": [], "failed": {}}
        self.write()

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def write(self) -> None:
        """Replace the file in one step, so that a reader never sees half of it."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)

    def measured(self, shape: str, op: str, result: dict, needed: cost.Cost) -> None:
        """Add a row, with its share of the limit if that was measured: the time `needed` over the time it took."""
        if limit := self.data["limits"].get(shape):
            seconds = needed.seconds(limit["flops_per_s"], limit["bytes_per_s"])
            result["of_limit"] = seconds * 1e3 / result["ms"]
        self.data["measurements"].append({"shape": shape, "op": op, **result})
        self.write()
        share = f"{result['of_limit']:6.2f} of the limit" if limit else ""
        print(f"{shape:16}{op:48}{result['ms']:9.2f} ms{result['extra_gib']:8.2f} GiB{share}", flush=True)

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do `work`. An exception, or a spent time budget, is recorded as a failure of `name`, and the run goes on."""
        if self.seconds_left() <= 0:
            self.fail(name, "skipped: the time budget is spent")
            return
        try:
            work()
        except Exception as error:
            self.fail(name, first_line(error))

    def fail(self, name: str, reason: str) -> None:
        self.data["failed"][name] = reason
        self.write()
        print(f"failed: {name} ({reason})", flush=True)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
