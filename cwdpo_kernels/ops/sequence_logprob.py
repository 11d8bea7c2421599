"""sequence_logprob: sums, means and counts of packed sequences' log-probs, with gradients of sums and means."""

from __future__ import annotations

from typing import Any

import torch

from .schema import Values, arguments, call, define, register_autograd, register_fake

define(
    "sequence_logprob",
    "(Tensor logp, Tensor labels, Tensor cu_seqlens, int ignore_index) -> (Tensor total, Tensor mean, Tensor count)",
)
define(
    "sequence_logprob_backward",
    "(Tensor grad_total, Tensor grad_mean, Tensor labels, Tensor count, Tensor cu_seqlens, int ignore_index) "
    "-> Tensor grad_logp",
)


@register_fake("sequence_logprob")
def _(*, logp, cu_seqlens, **_):
    total = logp.new_empty(cu_seqlens.shape[0] - 1)
    return total, torch.empty_like(total), torch.empty_like(total, dtype=torch.int64)


@register_fake("sequence_logprob_backward")
def _(*, grad_total, labels, **_):
    return grad_total.new_empty(labels.shape)


def _backward(ctx: Any, values: Values) -> Values:
    for name, other in (("grad_total", "grad_mean"), ("grad_mean", "grad_total")):
        if values[name] is None:
            values[name] = torch.zeros_like(values[other])
    return {"logp": call("sequence_logprob_backward", values)["grad_logp"]}


register_autograd(
    "sequence_logprob",
    differentiable=("total", "mean"),
    saves=lambda values: arguments("sequence_logprob_backward"),
    backward=_backward,
)
