"""The Cooling-Weighted DPO loss of P pairs, its metrics, and its gradient for every token.

    D_w, D_l = policy - reference log-prob of the chosen, rejected answer (sums, or means per token)
    w_c      = cooling weight of the rejected answer, a constant for the gradient
    loss     = mean over kept pairs of -log sigmoid(beta (D_w - w_c D_l))

Log-probs are first summed per sequence. A caller that has the sums already passes them as sequences of one "token",
with their counts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .cooling_weight import cooling_weight
from .sequence_logprob import mean_of, sums_and_counts, to_tokens


def cwdpo_loss(
    logp: Tensor, labels: Tensor | None, count: Tensor | None, cu_seqlens: Tensor, ref_chosen: Tensor,
    ref_rejected: Tensor, beta: float, logp_floor: float, temperature: float, constant: float | None,
    drop_below: float | None, per_token: bool, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, chosen_reward, rejected_reward, margin, accuracy, weight, kept, sum_logp, mean, count, grad_logp)."""
    sum_logp, mean, count, labelled = sequence_sums(logp, labels, count, cu_seqlens, ignore_index)
    pairs = sum_logp.shape[0] // 2
    length = count.clamp_min(1) if per_token else torch.ones_like(count)
    log_ratio = (sum_logp - torch.cat([ref_chosen, ref_rejected]).to(sum_logp.dtype)) / length
    ratio_chosen, ratio_rejected = log_ratio[:pairs], log_ratio[pairs:]

    weight = cooling_weight(mean[pairs:], logp_floor, temperature, constant)
    kept = (count[:pairs] > 0) & (count[pairs:] > 0)
    if drop_below is not None:
        kept = kept & ~(mean[pairs:] < drop_below)  # keeps NaN, so that a broken answer stays visible
    share = kept.to(sum_logp.dtype) / kept.sum().clamp_min(1)

    # A weight of 0 leaves out an impossible negative (0 * -inf), but not NaN.
    cooled = torch.where((weight == 0) & torch.isinf(ratio_rejected), 0.0, weight * ratio_rejected)
    logit = beta * (ratio_chosen - cooled)
    loss = (torch.where(kept, -logsigmoid(logit), 0.0) * share).sum()
    # d loss / d D_w = -coeff, d loss / d D_l = coeff * w_c
    coeff = torch.where(kept, beta * torch.sigmoid(-logit), 0.0) * share
    grad_sum_logp = torch.cat([-coeff, coeff * weight]) / length

    chosen_reward, rejected_reward = beta * ratio_chosen, beta * ratio_rejected
    margin = chosen_reward - rejected_reward
    accuracy = (margin > 0).to(margin.dtype)
    grad_logp = to_tokens(grad_sum_logp.to(logp.dtype), labelled, cu_seqlens)
    return loss, chosen_reward, rejected_reward, margin, accuracy, weight, kept, sum_logp, mean, count, grad_logp


def sequence_sums(
    logp: Tensor, labels: Tensor | None, count: Tensor | None, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_logp, mean, count [S] and the mask of labelled tokens [N].

    From token log-probs if `labels` is given, or from the sums of sequences, with `count`.
    """
    labelled = torch.ones_like(logp, dtype=torch.bool) if labels is None else labels != ignore_index
    sum_logp, count = sums_and_counts(logp, labelled, cu_seqlens, count)
    return sum_logp, mean_of(sum_logp, count), count, labelled
