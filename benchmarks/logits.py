"""Benchmark from logits to log-probs and their gradient, ours and those of torch and TRL (CPU).

The limit is the time of a copy that moves the same number of bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import cwdpo_kernels as ck
from benchmarks import cost, linear, memory, peers, timing
from cwdpo_kernels import reference
from cwdpo_kernels.testing import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
MODES = ("no_grad", "backward")


@dataclass(frozen=True)
class LogitsWorkload:
    """Logits [N, V] with standard deviation 2."""

    name: str
    tokens: int
    vocab: int
    dtype: torch.dtype

    def make(self, mode: str) -> tuple[Tensor, Tensor]:
        """logits [N, V] and labels [N]."""
        random = torch.Generator().manual_seed(0)
        logits = (2 * torch.randn(self.tokens, self.vocab, generator=random)).to(self.dtype)
        return logits.requires_grad_(mode == "backward"), torch.randint(self.vocab, (self.tokens,), generator=random)


WORKLOADS = [
    LogitsWorkload("smolvlm", 512, 49280, torch.float32),
    LogitsWorkload("smolvlm-bf16", 512, 49280, torch.bfloat16),
    LogitsWorkload("qwen2.5-vl-bf16", 512, 151936, torch.bfloat16),
]


def implementations(mode: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name -> function from logits [N, V] and labels [N] to log-probs [N]. Ours come first."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cwdpo_kernels": ck.logits_logprob}
    if mode == "backward":  # without backward both are the same
        found["cwdpo_kernels, reuse_logits"] = functools.partial(ck.logits_logprob, reuse_logits=True)
    found |= {
        "eager": reference.logits_logprob,
        "torch cross_entropy": lambda logits, labels: -F.cross_entropy(logits, labels, reduction="none"),
    }
    missing = peers.cannot_run("cpu")
    if "torch.compile, full logits" not in missing:
        found["torch.compile"] = _compiled
    if "TRL chunked log-prob" not in missing:
        from trl.trainer.utils import selective_log_softmax

        found["TRL selective_log_softmax"] = selective_log_softmax
    return found


_compiled = peers.compiled(reference.logits_logprob)


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return {
        f"{workload.name}/{mode}": lambda repeats, call, workload=workload, mode=mode: measure(
            workload, mode, repeats, call
        )
        for workload in WORKLOADS
        for mode in MODES
    }


def measure(workload: LogitsWorkload, mode: str, repeats: int, call: Callable) -> dict:
    """Errors, times, the measured limit and peak memory of every implementation."""
    logits, labels = workload.make(mode)
    found = implementations(mode)
    results: dict[str, dict] = {
        name: {"relative_error": error} for name, error in errors(workload, found, logits, labels).items()
    }
    steps = {name: functools.partial(step_seconds, logp, logits, labels) for name, logp in found.items()}
    with timing.others() as others:
        times = timing.interleaved(steps, repeats)
    medians = {name: timing.summary(values)["median_seconds"] for name, values in times.items()}
    moved = cost.logits_logprob(workload.tokens, workload.vocab, logits.itemsize, mode == "backward").bytes
    limit = moved / timing.copy_bytes_per_second()
    ratios = timing.against_best_peer(medians, {name for name in found if name.startswith("cwdpo_kernels")})
    for name, result in results.items():
        result |= timing.summary(times[name]) | {"of_limit": limit / medians[name]}
        result["extra_mib"] = call(peak, workload, mode, name) / 2**20
        if name in ratios:
            result["against_best_peer"] = ratios[name]
    record = {"name": workload.name, "tokens": workload.tokens, "vocab": workload.vocab}
    record["dtype"] = str(workload.dtype).removeprefix("torch.")
    return {"workload": record, "mode": mode, "limit_seconds": limit, "others": others(), "results": results}


def errors(workload: LogitsWorkload, found: dict[str, Callable], logits: Tensor, labels: Tensor) -> dict[str, dict]:
    """The relative errors of each implementation against float64. This run is also the warm-up.

    Raises SystemExit if an error of ours exceeds its tolerance.
    """
    truth = outcome(reference.logits_logprob, logits.detach().double().requires_grad_(logits.requires_grad), labels)
    result = {}
    for name, logp in found.items():
        values = outcome(logp, logits, labels)
        result[name] = {what: relative_error(value, truth[what]) for what, value in values.items()}
        for what, error in result[name].items():
            allowed = TOLERANCE[torch.float32 if what == "logp" else workload.dtype]
            if name.startswith("cwdpo_kernels") and not error <= allowed:
                raise SystemExit(linear.wrong(workload.name, name, what, error, allowed))
    return result


def outcome(logp: Callable, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The log-probs and, if the logits require it, their gradient."""
    leaf = logits.detach().clone().requires_grad_(logits.requires_grad)  # a copy: the gradient may overwrite it
    value = run_step(logp, leaf, labels)
    return {"logp": value} if leaf.grad is None else {"logp": value, "grad_logits": leaf.grad}


def run_step(logp: Callable, logits: Tensor, labels: Tensor) -> Tensor:
    with torch.set_grad_enabled(logits.requires_grad):
        value = logp(logits, labels)
    if logits.requires_grad:
        value.sum().backward()
    return value.detach()


def step_seconds(logp: Callable, logits: Tensor, labels: Tensor) -> float:
    leaf = logits.detach().clone().requires_grad_(logits.requires_grad)
    return timing.seconds(lambda: run_step(logp, leaf, labels))


def peak(workload: LogitsWorkload, mode: str, name: str) -> int:
    """Peak memory in bytes above the logits, gradient included, because `reuse_logits` saves it. Runs in a worker."""
    logp = implementations(mode)[name]
    for size in (8, 16):
        run_step(logp, *LogitsWorkload("warm-up", size, 2048 + size, workload.dtype).make(mode))

    def measured(inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        run_step(logp, *inputs)
        return []

    return memory.extra_bytes(lambda: workload.make(mode), measured)
