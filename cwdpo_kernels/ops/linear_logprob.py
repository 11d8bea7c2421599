"""linear_logprob: log-probability of a label under a linear head, without its logits.

Saved for backward: hidden, weight, bias, labels, three floats per row (logp, anchor, sum_exp) and the kept tiles. With
a frozen head: logp and the direction [N, D] only.

`anchor` and `sum_exp` [N] are the state of the softmax over the label's competitors. They are opaque: only the backend
that wrote them reads them.
    portable, csrc: anchor = max_{v != y} z_v,                        sum_exp = sum_{v != y} exp(z_v - anchor)
    triton:         anchor = an integer >= max_{v != y} z_v / ln 2,   sum_exp = sum_{v != y} exp(z_v - anchor ln 2)

`kept`: see kept_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..portable.tiles import compute_dtype
from .kept_tiles import backward_from_kept, direction_like, gradients_like, kept_like, other_gradients_like
from .schema import Values, arguments, define, register_autograd, register_fake

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
    direction = direction_like(hidden, with_direction)
    return logp, torch.empty_like(logp), torch.empty_like(logp), direction, kept_like(hidden, weight, kept_bytes)


register_fake("linear_logprob_backward")(gradients_like)
register_fake("linear_logprob_backward_")(other_gradients_like)


def along_direction(grad_logp: Tensor, logp: Tensor, direction: Tensor) -> Tensor:
    """The gradient of hidden [N, D]: grad_logp (1 - p_y) direction. Autograd casts it to the dtype of `hidden`."""
    factor = grad_logp * -torch.expm1(logp)
    return (direction * factor[:, None]).to(direction.dtype)


def _saves(values: Values) -> Iterable[str]:
    if values["with_direction"]:
        return "with_direction", "logp", "direction"
    return "with_direction", "kept_bytes", *arguments("linear_logprob_backward")


def _backward(ctx: Any, values: Values) -> Values:
    if values["with_direction"]:
        return {"hidden": along_direction(values["grad_logp"], values["logp"], values["direction"])}
    return backward_from_kept(ctx, "linear_logprob_backward", values)


register_autograd("linear_logprob", differentiable=("logp",), saves=_saves, backward=_backward)
