"""linear_logprob: log-probability of a label under a linear head, without its logits.

Saved for backward: hidden, weight, bias, labels, three floats a row (logp, peak, total) and the kept tiles;
with a frozen head only logp and the direction [N, D], nothing of the head.

Kept tiles cost no memory where they lie in that of the weight's gradient, which forward then takes and backward writes
over them. One backward can do so: a second one (`retain_graph`) recomputes them into memory of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..portable.tiles import compute_dtype
from .registry import define

define(
    "linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "bool with_direction, bool sparse_grad, SymInt workspace_bytes, SymInt? kept_bytes) "
    "-> (Tensor logp, Tensor peak, Tensor total, Tensor direction, Tensor kept)",
)
define(
    "linear_logprob_backward",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logp, Tensor peak, "
    "Tensor total, Tensor kept, float scale, float? softcap, int ignore_index, bool needs_hidden, bool needs_weight, "
    "bool needs_bias, bool sparse_grad, SymInt workspace_bytes) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
define(
    "linear_logprob_backward_",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logp, Tensor peak, "
    "Tensor total, Tensor(a!) kept, float scale, float? softcap, int ignore_index, bool needs_hidden, "
    "bool needs_bias, bool sparse_grad, SymInt workspace_bytes) -> (Tensor grad_hidden, Tensor grad_bias)",
)


@torch.library.register_fake(add_op_namespace_prefix("linear_logprob"))
def _(hidden, weight, bias, labels, *rest):
    *_, with_direction, _, _, kept_bytes = rest
    logp = hidden.new_empty(labels.shape, dtype=compute_dtype(hidden.dtype))
    direction = hidden.new_empty(hidden.shape if with_direction else (0, hidden.shape[1]))
    kept = torch.empty_like(weight) if kept_bytes is None else hidden.new_empty(kept_bytes, dtype=torch.uint8)
    return logp, torch.empty_like(logp), torch.empty_like(logp), direction, kept


@torch.library.register_fake(add_op_namespace_prefix("linear_logprob_backward"))
def _(grad_logp, hidden, weight, bias, *rest):
    *_, needs_hidden, needs_weight, needs_bias, _, _ = rest
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias else hidden.new_empty(0),
    )


@torch.library.register_fake(add_op_namespace_prefix("linear_logprob_backward_"))
def _(grad_logp, hidden, weight, bias, *rest):
    *_, needs_hidden, needs_bias, _, _ = rest
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias else hidden.new_empty(0),
    )


def kept_bytes(hidden: Tensor, weight: Tensor, softcap: float | None, budget: int | None) -> int | None:
    """What forward of a trainable head keeps, of at most `budget` bytes; None: what fits the weight's gradient.

    A GPU keeps tiles in the inputs' dtype, with their anchors, and none of a soft cap; a CPU keeps them as it computes
    them. A compiled graph cannot hand the gradient's memory on: what is kept would come on top. Float64 is for checks
    such as gradcheck, which wants the same bits of a second backward: products of fewer rows round differently.
    """
    if hidden.is_cuda and softcap is not None:
        return 0
    in_gradient = weight.requires_grad and weight.is_contiguous() and not torch.compiler.is_compiling()
    if budget is None and in_gradient and hidden.dtype != torch.float64:
        return None
    if hidden.is_cuda:
        with_anchors = weight.shape[0] + weight.shape[0] // 32 + 256
        return min(budget or 0, hidden.shape[0] * with_anchors * hidden.dtype.itemsize)
    useful = hidden.shape[0] * weight.shape[0] * compute_dtype(hidden.dtype).itemsize
    return min(budget or 0, useful)


def _takes_over(kept: Tensor, grad_logp: Tensor) -> bool:
    """Whether backward may write the weight's gradient over what forward kept in its memory ([V, D], not bytes).

    Not if that backward is differentiated, batched or traced itself: then others read it, too.
    """
    return (
        kept.dim() == 2
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(kept) is Tensor
        and torch._C._has_storage(grad_logp)  # a batch of gradients (vmap) has none
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, *ctx.transform, ctx.with_direction, sparse_grad, workspace_bytes, _ = inputs
    ctx.options, ctx.written_over = (sparse_grad, workspace_bytes), False
    logp, peak, total, direction, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(peak, total, direction, kept)
    if ctx.with_direction:
        ctx.save_for_backward(logp, direction)
    else:
        ctx.save_for_backward(logp, peak, total, kept, hidden, weight, bias, labels)


def _backward(ctx, grad_logp: Tensor | None, *_):
    none = (None,) * 11
    if grad_logp is None:
        return none
    if ctx.with_direction:
        logp, direction = ctx.saved_tensors
        pull = grad_logp * -torch.expm1(logp)  # d logp / d h = (1 - p_y) * direction
        return (direction * pull[:, None]).to(direction.dtype), *none[1:]
    logp, peak, total, kept, hidden, weight, bias, labels = ctx.saved_tensors
    kept = kept.new_empty(0) if ctx.written_over else kept.contiguous()  # a hook on saved tensors may change the layout
    saved = (grad_logp, hidden, weight, bias, labels, logp, peak, total)
    needs_hidden, needs_weight, needs_bias = needs = ctx.needs_input_grad[:3]
    if needs_weight and _takes_over(kept, grad_logp):
        ctx.written_over = True
        grad_weight = kept.data  # autograd can have this one without a copy, and its version is not that of `kept`
        grad_hidden, grad_bias = ops.linear_logprob_backward_(
            *saved, grad_weight, *ctx.transform, needs_hidden, needs_bias, *ctx.options
        )
        grads = grad_hidden, grad_weight, grad_bias
    else:
        grads = ops.linear_logprob_backward(*saved, kept, *ctx.transform, *needs, *ctx.options)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *none[3:])


torch.library.register_autograd(add_op_namespace_prefix("linear_logprob"), _backward, setup_context=_setup_context)
