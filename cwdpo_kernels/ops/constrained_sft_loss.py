"""constrained_sft_loss: the stage-1 loss from token (or sequence) log-probs, and its gradient for every token."""

from __future__ import annotations

import torch

from .scalar_loss import register_scalar_loss
from .schema import define, register_fake

define(
    "constrained_sft_loss",
    "(Tensor logp, Tensor? labels, Tensor? count, Tensor cu_seqlens, float weight, float nll_floor, str mode, "
    "bool per_token, int ignore_index) -> (Tensor loss, Tensor chosen_nll, Tensor rejected_nll, Tensor penalty, "
    "Tensor sum_logp, Tensor mean, Tensor count_out, Tensor grad_logp)",
)
register_scalar_loss("constrained_sft_loss")


@register_fake("constrained_sft_loss")
def _(*, logp, cu_seqlens, **_):
    scalars = [logp.new_empty(()) for _ in range(4)]
    sequences = cu_seqlens.shape[0] - 1
    sum_logp, mean = logp.new_empty(sequences), logp.new_empty(sequences)
    return *scalars, sum_logp, mean, logp.new_empty(sequences, dtype=torch.int64), logp.new_empty(logp.shape)
