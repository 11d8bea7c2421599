"""What the items of `benchmarks.tune` do, in the child process that has the GPU."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from benchmarks import ahead, gpu_measure, tune
from benchmarks.models import Shape
from cwdpo_kernels import IGNORE_INDEX
from cwdpo_kernels.testing import relative_error
from cwdpo_kernels.triton import configs, gradients, linear_logprob, sweep

REPEATS = 7
MOST_ERROR = 0.01  # of values and gradients, relative to those of the current row: more than bfloat16 rounds
KERNELS = {kernel.__name__: kernel for kernel in (sweep._sweep_kernel, gradients._gradient_kernel)}


def do(kind: str, op: str, shape: Shape, emit: Callable[[str, dict], None]) -> None:
    """Do an item and emit its rows: `candidates` for "tune compile", `tuned` for "tune"."""
    request = json.loads(op)
    if kind == "tune compile":
        for row in compile_ahead(shape, request["dtype"], request["configs"]):
            emit("candidates", row)
        return
    for kernel, ms in time_candidate(shape, request["dtype"], request["config"]).items():
        emit("tuned", {**describe(shape, request["dtype"], request["config"]), "kernel": kernel, "ms": ms})


def describe(shape: Shape, dtype: str, config: dict) -> dict:
    kind = configs.precision() if dtype == "float32" else "half"
    chip = configs.chip(torch.get_default_device())
    return {
        "dim": shape.dim, "dtype": dtype, "config": tune.text(config), "tokens": shape.tokens, "vocab": shape.vocab,
        "chip": chip, "precision": kind, "descriptors": configs.row_for(chip, kind, shape.dim).descriptors,
    }  # fmt: skip


@functools.lru_cache(1)
def inputs(shape: Shape, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] and labels [N] on the default device."""
    hidden, weight, labels = gpu_measure.linear_inputs(shape, getattr(torch, dtype))
    return hidden.detach(), weight.detach(), labels


def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """A forward without kept tiles and a backward: logp, grad_hidden, grad_weight."""
    head = (hidden, weight, None, labels, 1.0, None, IGNORE_INDEX)
    logp, anchor, sum_exp, _, kept = linear_logprob.linear_logprob(*head, False, False, 0, 0)
    grads = linear_logprob.linear_logprob_backward(
        torch.ones_like(logp), *head[:4], logp, anchor, sum_exp, kept, *head[4:], True, True, False, False, 0
    )
    return logp, *grads[:2]


@contextlib.contextmanager
def configured(dtype: str, config: dict) -> Iterator[None]:
    """Launch with `config` in place of every row for this chip and dtype, whatever its hidden size."""
    kind = configs.precision() if dtype == "float32" else "half"
    key = (configs.chip(torch.get_default_device()), kind)
    rows = {name: replace(row, **config) for name, row in configs.TILES.items() if name[:2] == key}
    with mock.patch.dict(configs.TILES, rows):
        yield


@contextlib.contextmanager
def on_chip(chip: str) -> Iterator[None]:
    """Use the rows of a chip that need not be here."""
    with (
        mock.patch.object(configs, "chip", return_value=chip),
        mock.patch.object(configs, "multiprocessors", return_value=132),
    ):
        yield


def compile_ahead(shape: Shape, dtype: str, found: list[dict], shared_limit: int | None = None) -> Iterator[dict]:
    """Compile the kernels of all candidates in parallel. Yields the row of a candidate once its kernels are compiled.

    `problem` is empty, or says why the candidate is dropped: an error of the compiler, or registers that are spilled.
    """
    waiting: dict[str, set[ahead.Launch]] = {}
    problems: dict[str, str] = {}
    for config in found:
        with ahead.recorded() as launches, configured(dtype, config):
            step(*inputs(shape, dtype))
        waiting[tune.text(config)] = {launch for launch in launches if launch.kernel in KERNELS}
    rows = {tune.text(config): describe(shape, dtype, config) for config in found}
    everything = list(dict.fromkeys(launch for launches in waiting.values() for launch in launches))
    for launch, resources in ahead.compile_all(everything):
        for name in [name for name, launches in waiting.items() if launch in launches]:
            if problem := problem_of(resources, shared_limit):
                problems.setdefault(name, f"{launch.kernel}: {problem}")
            waiting[name].remove(launch)
            if not waiting[name]:
                yield {**rows.pop(name), "problem": problems.get(name, "")}
    yield from ({**row, "problem": ""} for row in rows.values())  # those that launch nothing new


def problem_of(resources: dict | str, shared_limit: int | None) -> str:
    """Why a compiled kernel is not worth timing, or ""."""
    if isinstance(resources, str):
        return resources
    if spilled := resources.get("spill_bytes"):
        return f"{spilled} bytes spilled"
    if shared_limit is not None and resources["shared_bytes"] > shared_limit:
        return f"{resources['shared_bytes']} bytes of shared memory, the limit is {shared_limit}"
    return ""


@functools.lru_cache(1)
def expected(shape: Shape, dtype: str) -> tuple[Tensor, ...]:
    """The results with the current row."""
    return step(*inputs(shape, dtype))


def time_candidate(shape: Shape, dtype: str, config: dict) -> dict[str, float]:
    """Kernel -> milliseconds for the whole vocabulary. Raises ValueError if a result differs from the current row's."""
    right = expected(shape, dtype)
    with configured(dtype, config), first_launches() as launches:
        results = step(*inputs(shape, dtype))
    for name, actual, truth in zip(("logp", "grad_hidden", "grad_weight"), results, right, strict=True):
        error = relative_error(actual, truth)
        if not error <= MOST_ERROR:
            raise ValueError(f"{name}: expected the result of the current row, got a relative error of {error:.3g}")
    del results
    return {
        kernel: statistics.median(gpu_measure.milliseconds(launch) for _ in range(REPEATS)) * shape.vocab / columns
        for kernel, (launch, columns) in launches.items()
    }


@contextlib.contextmanager
def first_launches() -> Iterator[dict[str, tuple[Callable[[], object], int]]]:
    """Yield a dict that receives the first launch of each kernel, to be repeated, and its vocabulary columns."""
    found: dict[str, tuple[Callable[[], object], int]] = {}
    kind = type(sweep._sweep_kernel)
    run = kind.run

    def record(kernel, *args, **kwargs):
        name = kernel.__name__
        if name in KERNELS and name not in found:
            values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            first, end = (values[x] * values["BLOCK_V"] for x in ("first_tile_v", "end_tile_v"))
            found[name] = functools.partial(run, kernel, *args, **kwargs), min(end, values["V"]) - first
        return run(kernel, *args, **kwargs)

    with mock.patch.object(kind, "run", record):
        yield found
