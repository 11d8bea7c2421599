"""From hidden states to the CW-DPO loss and its gradients, beside the peers in the same process (CPU).

Every implementation is first compared with float64, and nothing is reported if ours is off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import memory, peers, timing
from benchmarks.peers import Implementation
from benchmarks.workloads import ON_A_CPU, Inputs, Workload
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, leaves, relative_error

# Ours: log-probs and the loss are of float32 quality in every dtype; a gradient is rounded to its own.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
PRODUCTS = {  # that no method can do without
    "no_grad": ("logits",),
    "frozen": ("logits", "grad_hidden"),
    "trainable": ("logits", "grad_hidden", "grad_weight"),
}


def measurements() -> dict[str, Callable]:
    """Name -> (repeats, worker's call) -> what was measured."""
    return {
        f"{workload.name}/{mode}": lambda repeats, call, workload=workload, mode=mode: measure(
            workload, mode, repeats, call
        )
        for workload, modes in ON_A_CPU.items()
        for mode in modes
    }


def measure(workload: Workload, mode: str, repeats: int, call: Callable, without: tuple[str, ...] = ()) -> dict:
    """Errors, seconds, the measured limit and peak memory of every implementation that applies, `without` some."""
    inputs = workload.make(mode)
    found = {name: peer for name, peer in applicable(workload, mode).items() if name not in without}
    results = {name: {"relative_error": error} for name, error in errors(workload, mode, inputs, found).items()}
    steps = {
        name: lambda step=implementation.step: step_seconds(step, inputs) for name, implementation in found.items()
    }
    parts = timing.products(workload.labelled, workload.dim, workload.vocab, workload.dtype)
    with timing.others() as others:
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
    return {
        name: implementation
        for name, implementation in peers.implementations().items()
        if (workload.all_tokens or not implementation.all_tokens)
        and (mode == "trainable" or not implementation.only_trainable)
    }


def run_step(step: Callable, inputs: Inputs) -> None:
    """The loss, and its gradients where the inputs ask for any."""
    if inputs.hidden.requires_grad:
        step(*inputs).backward()
    else:
        with torch.no_grad():
            step(*inputs)


def step_seconds(step: Callable, inputs: Inputs) -> float:
    inputs.hidden.grad = inputs.head.weight.grad = None
    return timing.seconds(lambda: run_step(step, inputs))


def errors(workload: Workload, mode: str, inputs: Inputs, found: dict[str, Implementation]) -> dict[str, dict]:
    """Of each implementation, relative to float64; also the warm-up. Stops if ours is outside its tolerance."""
    coolings = {implementation.cooling for implementation in found.values()}
    truths = {cooling: float64_truth(inputs, cooling) for cooling in coolings}
    result = {}
    for name, implementation in found.items():
        truth, values = truths[implementation.cooling], outcome(implementation, inputs)
        result[name] = {what: relative_error(value, truth[what]) for what, value in values.items()}
        for what, error in result[name].items():
            allowed = allowed_error(what, inputs, truth)
            if implementation.package == peers.OURS and not error <= allowed:
                where = f"{workload.name}/{mode}"
                raise SystemExit(f"{where}: {name} is wrong, nothing is reported: {what} is off by {error:.2g}")
    return result


def allowed_error(what: str, inputs: Inputs, truth: dict[str, Tensor]) -> float:
    """Of ours, relative. A loss of differences of float32 totals can be no better than their rounding."""
    if what == "logp":
        return VALUE_TOLERANCE
    rounding = torch.finfo(torch.float32).eps * peers.BETA * inputs.refs.abs().max().item()
    if what == "loss":
        return VALUE_TOLERANCE + rounding / abs(truth["loss"].item())
    return GRADIENT_TOLERANCE[inputs.hidden.dtype] + rounding


def outcome(implementation: Implementation, inputs: Inputs) -> dict[str, Tensor]:
    """The loss and its gradients; where there are none, the log-probs of the labelled tokens if they come out."""
    wanted = dict(zip(("grad_hidden", "grad_weight"), leaves(inputs.hidden, inputs.head), strict=False))
    with torch.set_grad_enabled(bool(wanted)):
        loss = implementation.step(*inputs)
        values = {"loss": loss.detach()}
        if wanted:
            values |= zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)
        elif implementation.logp is not None:
            logp = implementation.logp(inputs.hidden, inputs.head, inputs.labels)
            values["logp"] = logp[inputs.labels != -100]
    return values


def float64_truth(inputs: Inputs, cooling) -> dict[str, Tensor]:
    """Full logits of the labelled positions only: affordable in float64."""
    first = int((inputs.labels[0] != -100).nonzero()[0])
    hidden, head = as_float64(inputs.hidden, inputs.head)
    labels = inputs.labels[:, first:]

    def logp(hidden: Tensor, head, labels: Tensor) -> Tensor:
        return torch.nn.functional.pad(reference.linear_logprob(hidden[:, first:], head, labels[:, first:]), (first, 0))

    def step(hidden: Tensor, head, all_labels: Tensor, refs: Tensor) -> Tensor:
        token_logp = reference.linear_logprob(hidden[:, first:], head, labels)
        return peers.loss_of(token_logp, labels, refs, cooling)

    return outcome(Implementation("torch", step, logp), Inputs(hidden, head, inputs.labels, inputs.refs))


def peak(workload: Workload, mode: str, name: str) -> int:
    """Bytes; run in a worker."""
    step = peers.implementations()[name].step
    # Threads, BLAS, autograd and compilers take their own memory once: let them, on small copies of the workload
    # (two sizes: a compiler makes its code for any size at the second).
    for size in (8, 16):
        run_step(step, replace(workload, tokens=2 * size, response=size, vocab=2048 + size).make(mode))

    def measured(inputs: Inputs) -> list[Tensor]:
        run_step(step, inputs)
        return [x.grad for x in (inputs.hidden, inputs.head.weight) if x.grad is not None]

    return memory.extra_bytes(lambda: workload.make(mode), measured)
