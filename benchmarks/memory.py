"""Measures the peak resident memory of a step, above its inputs and gradients, in a separate process (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import torch._dynamo
from torch import Tensor

M_MMAP_THRESHOLD = -3  # option of mallopt(3)
TRIALS = 3
Inputs = TypeVar("Inputs")


@contextlib.contextmanager
def worker(warm_up: bool = True) -> Iterator[Callable]:
    """Start a new process and yield `call(function, *args)`, which runs a module-level function there.

    The process returns every freed block of 64 KiB or more to the operating system. Otherwise the allocator would reuse
    memory of earlier steps and hide the peak of the next one. A warm-up makes the matrix product libraries allocate
    their buffers, which they keep, before anything is measured. It takes minutes on a CPU without bfloat16 products.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(warm_up,)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _start(warm_up: bool) -> None:
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16):
        raise OSError("memory: expected mallopt to accept M_MMAP_THRESHOLD, got an error")
    for dtype in (torch.float32, torch.bfloat16) if warm_up else ():
        hidden, weight = torch.randn(1024, 512).to(dtype), torch.randn(32768, 512).to(dtype)
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden


def extra_bytes(make: Callable[[], Inputs], step: Callable[[Inputs], list[Tensor]]) -> int:
    """Peak memory of `step(make())` above the memory before it, minus the gradients that `step` returns.

    If torch.compile compiled something meanwhile, the measurement is repeated on new inputs, because a compiler
    allocates memory only once.
    """
    for _ in range(TRIALS):
        inputs, graphs = make(), _compiled_graphs()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        reset_peak()
        gradients = step(inputs)
        extra = status("VmHWM") - before - sum(x.numel() * x.itemsize for x in gradients)
        if _compiled_graphs() == graphs:
            break
        del inputs, gradients
    return extra


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def reset_peak() -> None:
    """Reset the peak VmHWM to the current VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is resident memory, VmHWM its peak since `reset_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
