"""Errors of log-probs and gradients against float64, as a function of the label's probability (CPU).

After supervised fine-tuning most tokens are predicted with confidence, so that is the range that matters for
preference optimization.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import cwdpo_kernels as ck
from benchmarks import linear, peers
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, confident_inputs, leaves, relative_error

CONFIDENCES = (0.5, 0.9, 0.99, 0.999, 0.9999)  # probability of the label
DTYPES = (torch.float32, torch.bfloat16)
TOKENS, VOCAB, DIM = 128, 8192, 512
NAMES = ("logp", "grad_hidden", "grad_weight")


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return {
        f"{_name(dtype)}/{confidence}": lambda repeats, call, dtype=dtype, confidence=confidence: measure(
            dtype, confidence
        )
        for dtype in DTYPES
        for confidence in CONFIDENCES
    }


def measure(dtype: torch.dtype, confidence: float, tokens: int = TOKENS, vocab: int = VOCAB, dim: int = DIM) -> dict:
    """Relative errors in the 2-norm of the log-probs and of the gradients of their sum.

    Raises SystemExit if an error of ours exceeds its tolerance.
    """
    flat, head, labels = confident_inputs(confidence, tokens, vocab, dim, dtype)
    hidden = flat.detach()[None].requires_grad_()
    truth = outcome(reference.linear_logprob, *as_float64(hidden, head), labels[None])
    results = {}
    for name, implementation in peers.implementations().items():
        if implementation.logp is None or implementation.only_trainable:
            continue
        values = outcome(implementation.logp, hidden, head, labels[None])
        results[name] = {what: relative_error(values[what], truth[what]) for what in NAMES}
        for what, error in results[name].items():
            allowed = linear.GRADIENT_TOLERANCE[dtype] if what.startswith("grad") else linear.VALUE_TOLERANCE
            if implementation.package == peers.OURS and not error <= allowed:
                raise SystemExit(linear.wrong("accuracy", name, what, error, allowed))
    record = {"tokens": tokens, "vocab": vocab, "dim": dim, "dtype": _name(dtype)}
    median = truth["logp"].exp().median().item()
    return {"workload": record, "confidence": confidence, "median_confidence": median, "relative_error": results}


def outcome(logp: Callable[..., Tensor], hidden: Tensor, head: ck.Head, labels: Tensor) -> dict[str, Tensor]:
    """The log-probs, and the gradients of their sum."""
    value = logp(hidden, head, labels)
    return {"logp": value.detach()} | dict(
        zip(NAMES[1:], torch.autograd.grad(value.sum(), leaves(hidden, head)), strict=True)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
