"""linear_logprob: log-probability of a label under a linear head, without its logits.

Saved for backward: hidden, weight, bias, labels, three floats per row (logp, anchor, sum_exp) and the kept tiles. With
a frozen head: logp and the direction [N, D] only.

`anchor` and `sum_exp` [N] are the state of the softmax over the label's competitors. They are opaque: only the backend
that wrote them reads them.
    portable, csrc: anchor = max_{v != y} z_v,                        sum_exp = sum_{v != y} exp(z_v - anchor)
    triton:         anchor = an integer >= max_{v != y} z_v / ln 2,   sum_exp = sum_{v != y} exp(z_v - anchor ln 2)

`kept` holds tiles of logits or exponentials that backward does not recompute. By default forward allocates the weight's
gradient early and keeps the tiles in it; backward then overwrites them with the gradient, so they cost no memory. Only
one backward can do that. A second one (`retain_graph`) recomputes the tiles and allocates its own gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..portable.tiles import compute_dtype, direction_dtype
from .checks import UNINITIALIZED
from .schema import Values, arguments, call, define, register_autograd, register_fake

define(
    "linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "bool with_direction, bool sparse_grad, SymInt workspace_bytes, SymInt? kept_bytes) "
    "-> (Tensor logp, Tensor anchor, Tensor sum_exp, Tensor direction, Tensor kept)",
)
define(
    "linear_logprob_backward",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logp, Tensor anchor, "
    "Tensor sum_exp, Tensor kept, float scale, float? softcap, int ignore_index, bool needs_hidden, bool needs_weight, "
    "bool needs_bias, bool sparse_grad, SymInt workspace_bytes) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
define(
    "linear_logprob_backward_",
    "(Tensor grad_logp, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logp, Tensor anchor, "
    "Tensor sum_exp, Tensor(a!) kept, float scale, float? softcap, int ignore_index, bool needs_hidden, "
    "bool needs_bias, bool sparse_grad, SymInt workspace_bytes) -> (Tensor grad_hidden, Tensor grad_bias)",
)


@register_fake("linear_logprob")
def _(*, hidden, weight, labels, with_direction, kept_bytes, **_):
    logp = hidden.new_empty(labels.shape, dtype=compute_dtype(hidden.dtype))
    shape = hidden.shape if with_direction else (0, hidden.shape[1])
    direction = hidden.new_empty(shape, dtype=direction_dtype(hidden.dtype))
    in_gradient = kept_bytes is None or kept_bytes == UNINITIALIZED
    kept = torch.empty_like(weight) if in_gradient else hidden.new_empty(kept_bytes, dtype=torch.uint8)
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


def kept_bytes(hidden: Tensor, weight: Tensor, softcap: float | None, budget: int | None) -> int:
    """How many bytes forward of a trainable head keeps; UNINITIALIZED: as many tiles as fit into the weight's gradient.

    `budget` is `MemoryBudget.kept_bytes`. A GPU keeps tiles in the inputs' dtype, and none under a soft cap. A CPU
    keeps tiles in the dtype of its computation.

    By default nothing is kept in a compiled graph, which cannot pass the gradient's memory from forward to backward.
    Nor is anything in float64, which is for checks such as gradcheck: they expect the same bits from a second backward,
    but products of fewer rows round differently.
    """
    if hidden.is_cuda and softcap is not None:
        return 0
    in_gradient = weight.requires_grad and weight.is_contiguous() and not torch.compiler.is_compiling()
    if budget is None and in_gradient and hidden.dtype != torch.float64:
        return UNINITIALIZED
    itemsize = (hidden.dtype if hidden.is_cuda else compute_dtype(hidden.dtype)).itemsize
    alignment = 16  # on a GPU, the last bytes that are not a multiple of it are not used
    return min(budget or 0, hidden.shape[0] * weight.shape[0] * itemsize + alignment)


def _saves(values: Values) -> Iterable[str]:
    if values["with_direction"]:
        return "with_direction", "logp", "direction"
    return "with_direction", "kept_bytes", *arguments("linear_logprob_backward")


def _backward(ctx: Any, values: Values) -> Values:
    if values["with_direction"]:
        factor = values["grad_logp"] * -torch.expm1(values["logp"])  # d logp / d h = (1 - p_y) * direction
        direction = values["direction"]
        # Autograd casts it to the dtype of `hidden`, which differs for float16 only.
        return {"hidden": (direction * factor[:, None]).to(direction.dtype)}
    if getattr(ctx, "overwritten", False):  # an earlier backward has written its gradient there
        values["kept"] = values["kept"].new_empty(0)
    else:
        values["kept"] = values["kept"].contiguous()  # saved-tensor hooks may change the layout
    if values["needs_weight"] and not ctx.create_graph and _may_overwrite(values):
        ctx.overwritten = True
        # An alias from `.data` becomes `.grad` without a copy, and writing to it does not bump the version of `kept`.
        values["kept"] = grad_weight = values["kept"].data
        grads = call("linear_logprob_backward_", values) | {"grad_weight": grad_weight}
    else:
        grads = call("linear_logprob_backward", values)
    return {name: grads[f"grad_{name}"] for name in ("hidden", "weight", "bias") if values[f"needs_{name}"]}


def _may_overwrite(values: Values) -> bool:
    """Whether backward may overwrite `kept` with the weight's gradient.

    Only if forward was asked for such memory [V, D], and not if backward is batched or traced, because `kept` is then
    read again.
    """
    return (
        values["kept_bytes"] == UNINITIALIZED
        and values["kept"].dim() == 2
        and not torch.compiler.is_compiling()
        and type(values["kept"]) is Tensor
        and torch._C._has_storage(values["grad_logp"])  # a batch of gradients (vmap) has none
    )


register_autograd("linear_logprob", differentiable=("logp",), saves=_saves, backward=_backward)
