"""sequence_logprob: sums, means and counts of packed sequences' log-probs, with gradients of sums and means."""

from __future__ import annotations

from typing import Any

import torch

from .schema import Values, arguments, call, define, register_autograd, register_fake

define(
    "sequence_logprob",
    "(Tensor logp, Tensor labels, Tensor cu_seqlens, int ignore_index) -> (Tensor sum_logp, Tensor mean, Tensor count)",
)
define(
    "sequence_logprob_backward",
    "(Tensor grad_sum_logp, Tensor grad_mean, Tensor labels, Tensor count, Tensor cu_seqlens, int ignore_index) "
    "-> Tensor grad_logp",
)


@register_fake("sequence_logprob")
def _(*, logp, cu_seqlens, **_):
    sum_logp = logp.new_empty(cu_seqlens.shape[0] - 1)
    return sum_logp, torch.empty_like(sum_logp), torch.empty_like(sum_logp, dtype=torch.int64)


@register_fake("sequence_logprob_backward")
def _(*, grad_sum_logp, labels, **_):
    return grad_sum_logp.new_empty(labels.shape)


def _backward(ctx: Any, values: Values) -> Values:
    for name, other in (("grad_sum_logp", "grad_mean"), ("grad_mean", "grad_sum_logp")):
        if values[name] is None:
            values[name] = torch.zeros_like(values[other])
    return {"logp": call("sequence_logprob_backward", values)["grad_logp"]}


register_autograd(
    "sequence_logprob",
    differentiable=("sum_logp", "mean"),
    saves=lambda values: arguments("sequence_logprob_backward"),
    backward=_backward,
)
