"""cwdpo_loss: the Cooling-Weighted DPO loss from token (or sequence) log-probs, and its gradient for every token."""

from __future__ import annotations

import torch

from .scalar_loss import register_scalar_loss
from .schema import define, register_fake

define(
    "cwdpo_loss",
    "(Tensor logp, Tensor? labels, Tensor? count, Tensor cu_seqlens, Tensor ref_chosen, Tensor ref_rejected, "
    "float beta, float logp_floor, float temperature, float? constant, float? drop_below, bool per_token, "
    "int ignore_index) -> (Tensor loss, Tensor chosen_reward, Tensor rejected_reward, Tensor margin, "
    "Tensor accuracy, Tensor weight, Tensor kept, Tensor sum_logp, Tensor mean, Tensor count_out, Tensor grad_logp)",
)
register_scalar_loss("cwdpo_loss")


@register_fake("cwdpo_loss")
def _(*, logp, cu_seqlens, **_):
    sequences = cu_seqlens.shape[0] - 1
    per_pair = [logp.new_empty(sequences // 2) for _ in range(5)]
    kept = logp.new_empty(sequences // 2, dtype=torch.bool)
    sum_logp, mean = logp.new_empty(sequences), logp.new_empty(sequences)
    count = logp.new_empty(sequences, dtype=torch.int64)
    return logp.new_empty(()), *per_pair, kept, sum_logp, mean, count, logp.new_empty(logp.shape)
