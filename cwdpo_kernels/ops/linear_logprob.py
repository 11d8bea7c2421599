"""linear_logprob: log-probability of a label under a linear head, without its logits.

Saved for backward: hidden, weight, bias, labels, three floats a row (logp, peak, total) and the kept tiles;
with a frozen head only logp and the direction [N, D], nothing of the head.

Kept tiles cost no memory where they lie in that of the weight's gradient, which forward then takes and backward writes
over them. One backward can do so: a second one (`retain_graph`) recomputes them into memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..portable.tiles import compute_dtype
from .schema import Values, arguments, call, define, register_autograd, register_fake

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


@register_fake("linear_logprob")
def _(*, hidden, weight, labels, with_direction, kept_bytes, **_):
    logp = hidden.new_empty(labels.shape, dtype=compute_dtype(hidden.dtype))
    direction = hidden.new_empty(hidden.shape if with_direction else (0, hidden.shape[1]))
    kept = torch.empty_like(weight) if kept_bytes is None else hidden.new_empty(kept_bytes, dtype=torch.uint8)
    return logp, torch.empty_like(logp), torch.empty_like(logp), direction, kept


@register_fake("linear_logprob_backward")
def _(*, hidden, weight, bias, needs_hidden, needs_weight, needs_bias, **_):
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias else hidden.new_empty(0),
    )


@register_fake("linear_logprob_backward_")
def _(*, hidden, bias, needs_hidden, needs_bias, **_):
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


def _saves(values: Values) -> Iterable[str]:
    if values["with_direction"]:
        return "with_direction", "logp", "direction"
    return "with_direction", *arguments("linear_logprob_backward")


def _backward(ctx: Any, values: Values) -> Values:
    if values["with_direction"]:
        pull = values["grad_logp"] * -torch.expm1(values["logp"])  # d logp / d h = (1 - p_y) * direction
        direction = values["direction"]
        return {"hidden": (direction * pull[:, None]).to(direction.dtype)}
    if getattr(ctx, "overwritten", False):
        values["kept"] = values["kept"].new_empty(0)
    else:
        values["kept"] = values["kept"].contiguous()  # a hook on saved tensors may have changed the layout
    if values["needs_weight"] and _may_overwrite(values["kept"], values["grad_logp"]):
        ctx.overwritten = True
        # `.data`: autograd can take this alias without a copy, and it does not share the version of `kept`.
        values["kept"] = grad_weight = values["kept"].data
        grads = call("linear_logprob_backward_", values) | {"grad_weight": grad_weight}
    else:
        grads = call("linear_logprob_backward", values)
    return {name: grads[f"grad_{name}"] for name in ("hidden", "weight", "bias") if values[f"needs_{name}"]}


def _may_overwrite(kept: Tensor, grad_logp: Tensor) -> bool:
    """Whether backward may write the weight's gradient over what forward kept in its memory ([V, D], not bytes).

    Not if that backward is differentiated, batched or traced itself, because then others read `kept`, too.
    """
    return (
        kept.dim() == 2
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(kept) is Tensor
        and torch._C._has_storage(grad_logp)  # a batch of gradients (vmap) has none
    )


register_autograd("linear_logprob", differentiable=("logp",), saves=_saves, backward=_backward)
