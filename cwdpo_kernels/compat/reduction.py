"""The `reduction` argument of cross-entropy functions."""

from __future__ import annotations

from torch import Tensor

from ..validation import expect

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(op: str, reduction: str) -> None:
    """Check that `reduction` is a known one."""
    expect(reduction in REDUCTIONS, op, "reduction", "a value in", ", ".join(REDUCTIONS), repr(reduction))


def reduced(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    """Reduce `loss` [...], which is 0 where the mask `counts` [...] is False. "mean" of no token is NaN."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()
