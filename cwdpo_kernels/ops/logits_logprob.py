"""logits_logprob: log-probability of a label from logits that exist already.

Saved for backward: the logits and three floats a row. With `reuse_logits` the gradient is written over the saved
logits: one backward only, which autograd's version counter enforces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..portable.tiles import compute_dtype
from .registry import define

define(
    "logits_logprob",
    "(Tensor logits, Tensor labels, int ignore_index, bool reuse_logits) -> (Tensor logp, Tensor peak, Tensor total)",
)
define(
    "logits_logprob_backward",
    "(Tensor grad_logp, Tensor logits, Tensor labels, Tensor logp, Tensor peak, Tensor total, "
    "int ignore_index) -> Tensor",
)
define(
    "logits_logprob_backward_",
    "(Tensor grad_logp, Tensor(a!) logits, Tensor labels, Tensor logp, Tensor peak, Tensor total, "
    "int ignore_index) -> ()",
)


@torch.library.register_fake(add_op_namespace_prefix("logits_logprob"))
def _(logits, labels, ignore_index, reuse_logits):
    logp = logits.new_empty(labels.shape, dtype=compute_dtype(logits.dtype))
    return logp, torch.empty_like(logp), torch.empty_like(logp)


@torch.library.register_fake(add_op_namespace_prefix("logits_logprob_backward"))
def _(grad_logp, logits, labels, logp, peak, total, ignore_index):
    return torch.empty_like(logits)


@torch.library.register_fake(add_op_namespace_prefix("logits_logprob_backward_"))
def _(grad_logp, logits, labels, logp, peak, total, ignore_index):
    return None


def _setup_context(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index, ctx.reuse_logits = inputs
    logp, peak, total = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(peak, total)
    ctx.save_for_backward(logits, labels, logp, peak, total)


def _backward(ctx, grad_logp: Tensor | None, *_):
    if grad_logp is None:
        return None, None, None, None
    logits, labels, logp, peak, total = ctx.saved_tensors
    args = (grad_logp, logits, labels, logp, peak, total, ctx.ignore_index)
    if not ctx.reuse_logits:
        return ops.logits_logprob_backward(*args), None, None, None
    ops.logits_logprob_backward_(*args)
    torch.autograd.graph.increment_version(logits)  # a kernel writes behind autograd's back
    return logits, None, None, None


torch.library.register_autograd(add_op_namespace_prefix("logits_logprob"), _backward, setup_context=_setup_context)
