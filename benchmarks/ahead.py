"""Compiles Triton kernels before they run, in parallel: launches are recorded with their specializations, not run.

    with recorded() as launches:
        step()                        # launches nothing that is not compiled yet; results mean nothing
    compile_all(launches)             # fills Triton's cache on disk, from which the next launch loads

Recording needs a device, or `without_device(target)`, which takes tensors on the device "meta". Compiling needs none.
Every process that is to find kernels in the cache calls `fix_keys()` before its first launch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

PACKAGE = "cwdpo_kernels"


@dataclass(frozen=True)
class Launch:
    """A kernel, what Triton specializes it for, and the target, both as JSON."""

    module: str
    kernel: str
    specialization: str
    target: str


def fix_keys() -> None:
    """Compute the cache keys of all kernels in a fixed order.

    Triton computes a key when it first needs it, and the key of a kernel that calls functions depends on which of those
    have a key already. So the order of launches would decide whether a kernel is found in the cache.
    """
    package = importlib.import_module(f"{PACKAGE}.triton")
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for _, function in sorted(vars(module).items()):
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Yield a list that receives our launches of kernels that are not compiled yet, each specialization once."""
    launches: dict[Launch, None] = {}
    result: list[Launch] = []

    def hook(*, fn, compile: dict, **_) -> bool:
        if fn.module.split(".")[0] != PACKAGE:
            return False
        target = json.dumps(vars(driver.active.get_current_target()))
        launch = Launch(fn.module, fn.jit_function.fn.__name__, compile["specialization_data"], target)
        if launch not in launches:
            launches[launch] = None
            result.append(launch)
        return True  # skips compilation and launch

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        yield result
    finally:
        knobs.runtime.jit_cache_hook = before


class _NoDevice:
    """Triton's driver, as far as compilation asks for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def without_device(target: GPUTarget) -> Iterator[None]:
    """Kernels are compiled for `target`, which need not be here."""
    before = driver._active
    driver.set_active(_NoDevice(target))
    try:
        yield
    finally:
        driver._active = before


def compile_one(launch: Launch) -> dict:
    """Compile a recorded launch for the target that it was recorded for, and return the resources that it uses."""
    from benchmarks.compiled import _cuda_resources  # imports all kernels

    fix_keys()
    target = GPUTarget(**json.loads(launch.target))
    with without_device(target):
        kernel = getattr(importlib.import_module(launch.module), launch.kernel).preload(launch.specialization)
    found = {"shared_bytes": kernel.metadata.shared}
    return found | (_cuda_resources(kernel) if target.backend == "cuda" else {})


def compile_all(launches: list[Launch], workers: int | None = None) -> Iterator[tuple[Launch, dict | str]]:
    """Compile in parallel over the cores. Yields, as they finish, each launch with its resources or its error.

    If the caller stops early, launches that have not started are not compiled.
    """
    workers = min(workers or os.cpu_count() or 1, len(launches))
    if not launches:
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(compile_one, launch): launch for launch in launches}
        try:
            for task in as_completed(tasks):
                error = task.exception()
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                yield tasks[task], task.result() if error is None else text
        finally:
            pool.shutdown(cancel_futures=True)


def summary(launches: list[Launch], workers: int | None = None) -> dict:
    """Compile, and return the number of kernels, the seconds that it took, and the errors by kernel."""
    start = time.perf_counter()
    errors = {launch.kernel: found for launch, found in compile_all(launches, workers) if isinstance(found, str)}
    return {"kernels": len(launches), "seconds": time.perf_counter() - start, "errors": errors}
