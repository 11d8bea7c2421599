"""sequence_logprob: totals, means and counts of packed sequences, with gradients of totals and means."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from .registry import define

define(
    "sequence_logprob",
    "(Tensor logp, Tensor labels, Tensor cu_seqlens, int ignore_index) -> (Tensor total, Tensor mean, Tensor count)",
)
define(
    "sequence_logprob_backward",
    "(Tensor grad_total, Tensor grad_mean, Tensor labels, Tensor count, Tensor cu_seqlens, int ignore_index) -> Tensor",
)


@torch.library.register_fake(add_op_namespace_prefix("sequence_logprob"))
def _(logp, labels, cu_seqlens, ignore_index):
    total = logp.new_empty(cu_seqlens.shape[0] - 1)
    return total, torch.empty_like(total), torch.empty_like(total, dtype=torch.int64)


@torch.library.register_fake(add_op_namespace_prefix("sequence_logprob_backward"))
def _(grad_total, grad_mean, labels, count, cu_seqlens, ignore_index):
    return grad_total.new_empty(labels.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, labels, cu_seqlens, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(labels, output[2], cu_seqlens)


def _backward(ctx, grad_total: Tensor, grad_mean: Tensor, _):
    args = (*ctx.saved_tensors, ctx.ignore_index)
    return ops.sequence_logprob_backward(grad_total, grad_mean, *args), None, None, None


torch.library.register_autograd(add_op_namespace_prefix("sequence_logprob"), _backward, setup_context=_setup_context)
