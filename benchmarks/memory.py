"""Peak resident memory of a step, over its inputs and gradients, in a process of its own (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from torch import Tensor

M_MMAP_THRESHOLD = -3  # of mallopt(3)


@contextlib.contextmanager
def worker() -> Iterator[Callable]:
    """A fresh process; yields `call(function, *args)`, which runs a module-level function there.

    In it every block from 64 KiB on is the kernel's again as soon as it is freed. An allocator that keeps what earlier
    steps needed would hide the peak of the next one.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_return_freed_blocks) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _return_freed_blocks() -> None:
    if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16):
        raise OSError("memory: mallopt refused a fixed threshold for mapped blocks")


def extra_bytes(step: Callable[[], list[Tensor]]) -> int:
    """Peak while `step` runs over what was there before it, less the gradients that it returns."""
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    reset_peak()
    gradients = step()
    return status("VmHWM") - before - sum(x.numel() * x.itemsize for x in gradients)


def reset_peak() -> None:
    """VmHWM <- VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS is resident now, VmHWM the most since `reset_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
