"""Tiles that forward of a linear op keeps for backward, and backward from them.

`kept` holds tiles of logits or exponentials that backward does not recompute. By default forward allocates the weight's
gradient early and keeps the tiles in it; backward then overwrites them with the gradient, so they cost no memory. Only
one backward can do that. A second one (`retain_graph`) recomputes the tiles and allocates its own gradient.

This holds for every op `x` with the backward ops `x_backward` and `x_backward_`; the latter writes the weight's
gradient over `kept`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..portable.tiles import compute_dtype
from .checks import UNINITIALIZED
from .schema import Values, call


def kept_bytes(
    hidden: Tensor, weight: Tensor, softcap: float | None, budget: int | None, of_logits: bool = False
) -> int:
    """How many bytes forward of a trainable head keeps; UNINITIALIZED: as many tiles as fit into the weight's gradient.

    `budget` is `MemoryBudget.kept_bytes`. A GPU keeps exponentials in the inputs' dtype: none under a soft cap, and
    none if backward needs logits (`of_logits`). A CPU keeps logits in the dtype of its computation, or exponentials in
    bfloat16 where it has products of that dtype and backward does not need logits.

    By default nothing is kept in a compiled graph, which cannot pass the gradient's memory from forward to backward.
    Nor is anything in float64, which is for checks such as gradcheck: they expect the same bits from a second backward,
    but products of fewer rows round differently.
    """
    if hidden.is_cuda and (of_logits or softcap is not None):
        return 0
    in_gradient = weight.requires_grad and weight.is_contiguous() and not torch.compiler.is_compiling()
    if budget is None and in_gradient and hidden.dtype != torch.float64:
        return UNINITIALIZED
    itemsize = (hidden.dtype if hidden.is_cuda else compute_dtype(hidden.dtype)).itemsize
    alignment = 16  # on a GPU, the last bytes that are not a multiple of it are not used
    return min(budget or 0, hidden.shape[0] * weight.shape[0] * itemsize + alignment)


def kept_like(hidden: Tensor, weight: Tensor, kept_bytes: int | None) -> Tensor:
    """Memory for kept tiles: that of the weight's gradient, or opaque bytes."""
    if kept_bytes is None or kept_bytes == UNINITIALIZED:
        return torch.empty_like(weight)
    return hidden.new_empty(kept_bytes, dtype=torch.uint8)


def gradients_like(
    *, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The shapes of the results of `x_backward`."""
    grad_weight = torch.empty_like(weight) if needs_weight else hidden.new_empty(0)
    grad_hidden, grad_bias = other_gradients_like(
        hidden=hidden, bias=bias, needs_hidden=needs_hidden, needs_bias=needs_bias
    )
    return grad_hidden, grad_weight, grad_bias


def other_gradients_like(
    *, hidden: Tensor, bias: Tensor | None, needs_hidden: bool, needs_bias: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    """The shapes of the results of `x_backward_`."""
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias and bias is not None else hidden.new_empty(0),
    )


def backward_from_kept(ctx: Any, op: str, values: Values) -> Values:
    """Gradients of hidden, weight and bias by name. `op` names the backward op that does not write over `kept`."""
    if getattr(ctx, "overwritten", False):  # an earlier backward has written its gradient there
        values["kept"] = values["kept"].new_empty(0)
    else:
        values["kept"] = values["kept"].contiguous()  # saved-tensor hooks may change the layout
    if values["needs_weight"] and not ctx.create_graph and _may_overwrite(values):
        ctx.overwritten = True
        # An alias from `.data` becomes `.grad` without a copy, and writing to it does not bump the version of `kept`.
        values["kept"] = grad_weight = values["kept"].data
        grads = call(f"{op}_", values) | {"grad_weight": grad_weight}
    else:
        grads = call(op, values)
    return {name: grads[f"grad_{name}"] for name in ("hidden", "weight", "bias") if values[f"needs_{name}"]}


def _may_overwrite(values: Values) -> bool:
    """Whether backward may overwrite `kept` with the weight's gradient.

    Only if forward was asked for such memory [V, D], and not if backward is batched or traced, because `kept` is then
    read again.
    """
    upstream = next(values[name] for name in ("grad_target", "grad_logp") if name in values)
    return (
        values["kept_bytes"] == UNINITIALIZED
        and values["kept"].dim() == 2
        and not torch.compiler.is_compiling()
        and type(values["kept"]) is Tensor
        and torch._C._has_storage(upstream)  # a batch of gradients (vmap) has none
    )
