"""Peak resident memory of a step, over its inputs and gradients, in a process of its own (Linux)."""

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

M_MMAP_THRESHOLD = -3  # of mallopt(3)
TRIALS = 3
Inputs = TypeVar("Inputs")


@contextlib.contextmanager
def worker() -> Iterator[Callable]:
    """A fresh process; yields `call(function, *args)`, which runs a module-level function there.

    In it every block from 64 KiB on is the kernel's again as soon as it is freed. An allocator that keeps what earlier
    steps needed would hide the peak of the next one. What the libraries for matrix products take once and keep is
    taken before anything is measured.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _start() -> None:
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16):
        raise OSError("memory: mallopt refused a fixed threshold for mapped blocks")
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = torch.randn(1024, 512).to(dtype), torch.randn(32768, 512).to(dtype)
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden


def extra_bytes(make: Callable[[], Inputs], step: Callable[[Inputs], list[Tensor]]) -> int:
    """Peak while `step` runs on what `make` gives, over what was there before it, less the gradients that it returns.

    Measured again, on new inputs, where torch.compile made code meanwhile: what a compiler takes is taken once.
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
    """VmHWM <- VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is resident now, VmHWM the most since `reset_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
