"""Autograd of an op that returns its scalar loss first and d loss / d logp last: a scaling, nothing recomputed."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix


def register_scalar_loss(name: str, n_inputs: int) -> None:
    """Only the first output (loss) is differentiable, and only in the first input (logp)."""

    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[-1])

    def backward(ctx, grad_loss: Tensor | None, *_):
        (grad_logp,) = ctx.saved_tensors
        return (None if grad_loss is None else grad_loss * grad_logp, *(None,) * (n_inputs - 1))

    torch.library.register_autograd(add_op_namespace_prefix(name), backward, setup_context=setup_context)
