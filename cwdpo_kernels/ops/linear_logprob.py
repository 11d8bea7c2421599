"""linear_logprob: log-probability of a label under a linear head, without its logits.

Saved for backward: hidden, weight, bias, labels, three floats per row (logp, anchor, sum_exp) and the kept tiles. With
a direction (frozen heads): labels, logp and the direction [N, D] only.

`anchor` and `sum_exp` [N] are the state of the softmax over the label's competitors. They are opaque: only the backend
that wrote them reads them.
    portable, csrc: anchor = max_{v != y} z_v,                        sum_exp = sum_{v != y} exp(z_v - anchor)
    triton:         anchor = an integer, see triton/primitives.py,    sum_exp = sum_{v != y} exp(z_v - anchor ln 2)

`kept`: see kept_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..portable.tiles import compute_dtype, new_direction
from ..validation import fail
from .kept_tiles import backward_from_kept, gradients_like, kept_like, other_gradients_like
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
    direction = new_direction(hidden, with_direction)
    return logp, torch.empty_like(logp), torch.empty_like(logp), direction, kept_like(hidden, weight, kept_bytes)


register_fake("linear_logprob_backward")(gradients_like)
register_fake("linear_logprob_backward_")(other_gradients_like)


FROM_DIRECTION = ("labels", "ignore_index", "logp", "direction")  # what the function reads beside the upstream gradient


def from_direction(values: Values) -> Values:
    """The gradient of hidden [N, D]: grad_logp (1 - p_y) direction, 0 for tokens whose upstream gradient is 0."""
    grad_logp = values["grad_logp"].masked_fill(values["labels"] == values["ignore_index"], 0)
    # Where logp is NaN, the direction is 0.
    factor = torch.where(grad_logp == 0, 0.0, grad_logp * -torch.expm1(values["logp"]))
    # Autograd casts it to the dtype of `hidden`, which differs for float16 only.
    return {"hidden": (values["direction"] * factor[:, None]).to(values["direction"].dtype)}


def expect_frozen(op: str, values: Values) -> None:
    """Raise an error if a direct call asks for the direction of a trainable head, which has no other gradient."""
    for name in ("weight", "bias"):
        if values[name] is not None and values[name].requires_grad:
            fail(op, "with_direction", "value", f"False ({name} requires a gradient)", True)


def _saves(values: Values) -> Iterable[str]:
    if values["with_direction"]:
        expect_frozen("linear_logprob", values)
        return "with_direction", *FROM_DIRECTION
    return "with_direction", "kept_bytes", *arguments("linear_logprob_backward")


def _backward(ctx: Any, values: Values) -> Values:
    if values["with_direction"]:
        return from_direction(values)
    return backward_from_kept(ctx, "linear_logprob_backward", values)


register_autograd("linear_logprob", differentiable=("logp",), saves=_saves, backward=_backward)
