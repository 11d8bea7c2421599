"""Benchmark from hidden states to the CW-DPO loss and its gradients, ours and the peers' in the same process (CPU).

Every implementation is compared with float64 first. Nothing is reported if an error of ours exceeds its tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import cwdpo_kernels as ck
from benchmarks import memory, peers, timing
from benchmarks.peers import Implementation
from benchmarks.workloads import ON_A_CPU, Inputs, Workload, by_mode
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, leaves, relative_error

# Relative errors allowed to ours. Log-probs and loss are float32 in every dtype; a gradient is rounded to its dtype.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
PRODUCTS = {  # the matrix products that every method needs
    "no_grad": ("logits",),
    "frozen": ("logits", "grad_hidden"),
    "trainable": ("logits", "grad_hidden", "grad_weight"),
}


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return by_mode(ON_A_CPU, measure)


def measure(
    workload: Workload, mode: str, repeats: int, call: Callable, without: tuple[str, ...] = (),
    beside: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict:  # fmt: skip
    """Errors, times, the measured limit and peak memory of every applicable implementation except those in `without`.

    `call` runs a function in a worker process (see memory.worker). Times are taken inside of `beside()`.
    """
    inputs = workload.make(mode)
    found = {name: peer for name, peer in applicable(workload, mode).items() if name not in without}
    results: dict[str, dict] = {
        name: {"relative_error": error} for name, error in errors(workload, mode, inputs, found).items()
    }
    steps = {
        name: lambda step=implementation.step: step_seconds(step, inputs) for name, implementation in found.items()
    }
    parts = timing.products(workload.labeled, workload.dim, workload.vocab, workload.dtype)
    with beside(), timing.others() as others:
        times = timing.interleaved(steps | parts, repeats)
    medians = {name: timing.summary(values)["median_seconds"] for name, values in times.items()}
    limit = sum(medians[part] for part in PRODUCTS[mode])
    ours = {name for name, implementation in found.items() if implementation.package == peers.OURS}
    ratios = timing.against_best_peer({name: medians[name] for name in found}, ours)
    for name, result in results.items():
        result |= timing.summary(times[name]) | {"of_limit": limit / medians[name]}
        result["extra_mib"] = call(peak, workload, mode, name) / 2**20
        if name in ratios:
            result["against_best_peer"] = ratios[name]
    gemm = {part: medians[part] for part in parts}
    return {
        "workload": workload.record(), "mode": mode, "gemm_seconds": gemm, "limit_seconds": limit,
        "others": others(), "results": results,
    }  # fmt: skip


def applicable(workload: Workload, mode: str) -> dict[str, Implementation]:
    """The implementations to measure for this workload and mode."""
    return {
        name: implementation
        for name, implementation in peers.implementations().items()
        if (workload.all_tokens or not implementation.all_tokens)
        and (mode == "trainable" or not implementation.only_trainable)
    }


def run_step(step: Callable, inputs: Inputs) -> None:
    """Compute the loss and, if the inputs require gradients, run backward."""
    if inputs.hidden.requires_grad:
        step(*inputs).backward()
    else:
        with torch.no_grad():
            step(*inputs)


def step_seconds(step: Callable, inputs: Inputs) -> float:
    inputs.hidden.grad = inputs.head.weight.grad = None
    return timing.seconds(lambda: run_step(step, inputs))


def errors(workload: Workload, mode: str, inputs: Inputs, found: dict[str, Implementation]) -> dict[str, dict]:
    """The relative errors of each implementation against float64. This run is also the warm-up.

    Raises SystemExit if an error of ours exceeds its tolerance.
    """
    coolings = {implementation.cooling for implementation in found.values()}
    truths = {cooling: float64_truth(inputs, cooling) for cooling in coolings}
    result = {}
    for name, implementation in found.items():
        truth, values = truths[implementation.cooling], outcome(implementation, inputs)
        result[name] = {what: relative_error(value, truth[what]) for what, value in values.items()}
        for what, error in result[name].items():
            allowed = allowed_error(what, inputs, truth)
            if implementation.package == peers.OURS and not error <= allowed:
                raise SystemExit(wrong(f"{workload.name}/{mode}", name, what, error, allowed))
    return result


def wrong(where: str, name: str, what: str, error: float, allowed: float) -> str:
    """The message for an error above its tolerance."""
    expected = f"expected a relative error of {what} of at most {allowed:.2g}, got {error:.2g}"
    return f"{where}: {name}: {expected}: nothing is reported"


def allowed_error(what: str, inputs: Inputs, truth: dict[str, Tensor]) -> float:
    """The relative error allowed to ours. A loss cannot be more exact than the float32 sums that it subtracts."""
    if what == "logp":
        return VALUE_TOLERANCE
    rounding = torch.finfo(torch.float32).eps * peers.BETA * inputs.refs.abs().max().item()
    if what == "loss":
        return VALUE_TOLERANCE + rounding / abs(truth["loss"].item())
    return GRADIENT_TOLERANCE[inputs.hidden.dtype] + rounding


def outcome(implementation: Implementation, inputs: Inputs) -> dict[str, Tensor]:
    """The loss and its gradients. Without gradients, the loss and, if there are any, the labeled log-probs."""
    wanted = dict(zip(("grad_hidden", "grad_weight"), leaves(inputs.hidden, inputs.head), strict=False))
    with torch.set_grad_enabled(bool(wanted)):
        loss = implementation.step(*inputs)
        values = {"loss": loss.detach()}
        if wanted:
            values |= zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)
        elif implementation.logp is not None:
            logp = implementation.logp(inputs.hidden, inputs.head, inputs.labels)
            values["logp"] = logp[inputs.labels != ck.IGNORE_INDEX]
    return values


def float64_truth(inputs: Inputs, cooling: ck.Cooling) -> dict[str, Tensor]:
    """The outcome in float64. Computes logits of labeled positions only, to save memory."""
    first = int((inputs.labels[0] != ck.IGNORE_INDEX).nonzero()[0])
    hidden, head = as_float64(inputs.hidden, inputs.head)
    labels = inputs.labels[:, first:]

    def logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
        return torch.nn.functional.pad(reference.linear_logprob(hidden[:, first:], head, labels[:, first:]), (first, 0))

    def step(hidden: Tensor, head: ck.Head, all_labels: Tensor, refs: Tensor) -> Tensor:
        token_logp = reference.linear_logprob(hidden[:, first:], head, labels)
        return peers.loss_of(token_logp, labels, refs, cooling)

    return outcome(Implementation("torch", step, logp), Inputs(hidden, head, inputs.labels, inputs.refs))


def peak(workload: Workload, mode: str, name: str) -> int:
    """Peak memory of a step in bytes. Runs in a worker."""
    return peak_of(peers.implementations()[name].step, workload, mode)


def peak_of(step: Callable, workload: Workload, mode: str) -> int:
    """Peak memory of `step` (see `run_step`) on a workload, in bytes."""
    # Warm up on small copies of the workload: threads, BLAS, autograd and compilers allocate memory once. It takes two
    # sizes, because at the second size a compiler generates code for any size.
    for size in (8, 16):
        run_step(step, replace(workload, tokens=2 * size, response=size, vocab=2048 + size).make(mode))

    def measured(inputs: Inputs) -> list[Tensor]:
        run_step(step, inputs)
        return [x.grad for x in (inputs.hidden, inputs.head.weight) if x.grad is not None]

    return memory.extra_bytes(lambda: workload.make(mode), measured)
