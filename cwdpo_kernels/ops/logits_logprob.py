"""logits_logprob: log-probability of a label from existing logits.

Saved for backward: the logits, labels and three floats per row (logp, anchor, sum_exp; see linear_logprob.py). With
`reuse_logits` the gradient overwrites the saved logits, so backward can run only once; autograd's version counter
enforces it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..portable.tiles import compute_dtype
from .schema import Values, arguments, call, define, register_autograd, register_fake

define(
    "logits_logprob",
    "(Tensor logits, Tensor labels, int ignore_index, bool reuse_logits) "
    "-> (Tensor logp, Tensor anchor, Tensor sum_exp)",
)
define(
    "logits_logprob_backward",
    "(Tensor grad_logp, Tensor logits, Tensor labels, Tensor logp, Tensor anchor, Tensor sum_exp, "
    "int ignore_index) -> Tensor grad_logits",
)
define(
    "logits_logprob_backward_",
    "(Tensor grad_logp, Tensor(a!) logits, Tensor labels, Tensor logp, Tensor anchor, Tensor sum_exp, "
    "int ignore_index) -> ()",
)


@register_fake("logits_logprob")
def _(*, logits, labels, **_):
    logp = logits.new_empty(labels.shape, dtype=compute_dtype(logits.dtype))
    return logp, torch.empty_like(logp), torch.empty_like(logp)


@register_fake("logits_logprob_backward")
def _(*, logits, **_):
    return torch.empty_like(logits)


@register_fake("logits_logprob_backward_")
def _(**_):
    return None


def _backward(ctx: Any, values: Values) -> Values:
    if not values["reuse_logits"] or ctx.create_graph:
        return {"logits": call("logits_logprob_backward", values)["grad_logits"]}
    call("logits_logprob_backward_", values)
    torch.autograd.graph.increment_version(values["logits"])  # the kernel writes behind autograd's back
    return {"logits": values["logits"]}


register_autograd(
    "logits_logprob",
    differentiable=("logp",),
    saves=lambda values: ("reuse_logits", *arguments("logits_logprob_backward")),
    backward=_backward,
)
