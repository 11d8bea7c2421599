"""linear_logprob: log-probability of a label under a linear head, without its logits.

Saved for backward: hidden, weight, bias, labels and three floats a row (logp, peak, total);
with a frozen head only logp and the direction [N, D], nothing of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cwdpo_kernels.ops.registry import define, implement
from cwdpo_kernels.portable import linear_logprob as portable
from cwdpo_kernels.portable.tiles import compute_dtype

KEPT_BYTES_ON_A_CPU = 88 << 20  # with the workspace and N x D no more than a small step of cut-cross-entropy takes

define(
    "linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "bool with_direction, bool sparse_grad, SymInt workspace_bytes, SymInt kept_bytes) "
    "-> (Tensor logp, Tensor peak, Tensor total, Tensor direction, Tensor kept)",
)
define(
    "linear_logprob_backward",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logp, Tensor peak, "
    "Tensor total, Tensor kept, float scale, float? softcap, int ignore_index, bool needs_hidden, bool needs_weight, "
    "bool needs_bias, bool sparse_grad, SymInt workspace_bytes) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
implement("linear_logprob", portable.linear_logprob, triton="linear_logprob")
implement("linear_logprob_backward", portable.linear_logprob_backward, triton="linear_logprob")


@torch.library.register_fake("cwdpo::linear_logprob")
def _(hidden, weight, bias, labels, *rest):
    *_, with_direction, _, _, kept_bytes = rest
    logp = hidden.new_empty(labels.shape, dtype=compute_dtype(hidden.dtype))
    direction = hidden.new_empty(hidden.shape if with_direction else (0, hidden.shape[1]))
    return (
        logp,
        torch.empty_like(logp),
        torch.empty_like(logp),
        direction,
        hidden.new_empty(kept_bytes, dtype=torch.uint8),
    )


@torch.library.register_fake("cwdpo::linear_logprob_backward")
def _(grad_logp, hidden, weight, bias, *rest):
    *_, needs_hidden, needs_weight, needs_bias, _, _ = rest
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias else hidden.new_empty(0),
    )


def kept_bytes(hidden: Tensor, weight: Tensor, budget: int | None) -> int:
    """What forward of a trainable head keeps, of at most `budget` bytes (None: the device's own choice).

    A GPU keeps tiles in the inputs' dtype and needs room for whole tiles; a CPU keeps them as it computes them.
    """
    if hidden.is_cuda:
        whole_tiles = weight.shape[0] + weight.shape[0] // 32 + 256
        return min(budget or 0, hidden.shape[0] * whole_tiles * hidden.dtype.itemsize)
    useful = hidden.shape[0] * weight.shape[0] * compute_dtype(hidden.dtype).itemsize
    return min(KEPT_BYTES_ON_A_CPU if budget is None else budget, useful)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, *ctx.transform, ctx.with_direction, ctx.sparse_grad, ctx.workspace_bytes, _ = inputs
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
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.cwdpo.linear_logprob_backward(
        grad_logp,
        hidden,
        weight,
        bias,
        labels,
        logp,
        peak,
        total,
        kept,
        *ctx.transform,
        *needs,
        ctx.sparse_grad,
        ctx.workspace_bytes,
    )
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *none[3:])


torch.library.register_autograd("cwdpo::linear_logprob", _backward, setup_context=_setup_context)
