"""What cross-entropy functions call `reduction`."""

from __future__ import annotations

from torch import Tensor

from ..validation import expect

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(op: str, reduction: str) -> None:
    expect(reduction in REDUCTIONS, op, "reduction", "a value in", ", ".join(REDUCTIONS), repr(reduction))


def reduced(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """`loss` [...], 0 where `counts` [...] is False: itself, its sum, or its mean over what counts (NaN for none)."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()
