"""Autograd of a loss op whose forward also returns d loss / d logp as `grad_logp`, which backward only scales."""

from __future__ import annotations

from typing import Any

from .schema import Values, register_autograd


def register_scalar_loss(op: str) -> None:
    """Only the result `loss` is differentiable, and only in the argument `logp`."""

    def backward(ctx: Any, values: Values) -> Values:
        return {"logp": values["grad_loss"] * values["grad_logp"]}

    register_autograd(op, differentiable=("loss",), saves=lambda values: ["grad_logp"], backward=backward)
