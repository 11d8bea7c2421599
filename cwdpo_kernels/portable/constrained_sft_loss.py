"""Stage 1: NLL of the chosen answers plus a gentle term on the rejected ones, and its gradient for every token.

    hinge:     loss = NLL(y+) + weight * relu(nll_floor - NLL(y-))
    hard:      loss = nll_floor - NLL(y-)  where that is positive, else NLL(y+)
    smoothed:  loss = NLL(y+) + weight * NLL(y-)        (the caller adds the label smoothing)

NLL(.) averages the NLL per token (or per sequence) over the non-empty answers of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cwdpo_loss import sequence_sums
from .sequence_logprob import to_tokens


def constrained_sft_loss(
    logp: Tensor, labels: Tensor | None, count: Tensor | None, cu_seqlens: Tensor, weight: float, nll_floor: float,
    mode: str, per_token: bool, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, chosen_nll, rejected_nll, penalty, sum_logp, mean, count, grad_logp)."""
    sum_logp, mean, count, labelled = sequence_sums(logp, labels, count, cu_seqlens, ignore_index)
    pairs = sum_logp.shape[0] // 2
    length = count.clamp_min(1) if per_token else torch.ones_like(count)
    used = (count > 0).view(2, pairs)
    share = used.to(sum_logp.dtype) / used.sum(1, keepdim=True).clamp_min(1)
    share = share.flatten() / length
    nll = torch.where(share == 0, 0.0, -sum_logp * share).to(sum_logp.dtype)
    chosen_nll, rejected_nll = nll[:pairs].sum(), nll[pairs:].sum()

    shortfall = nll_floor - rejected_nll
    # Without any rejected answer there is no penalty, whatever the floor. NaN is active, so that it stays visible.
    active = used[1].any() & ~(shortfall <= 0)
    if mode == "hard":
        weight = 1.0
    if mode != "smoothed":
        penalty = torch.where(active, weight * shortfall, 0.0)
    else:  # a weight of 0 leaves out impossible negatives (0 * inf)
        penalty = torch.where(torch.isinf(rejected_nll) & (weight == 0), 0.0, weight * rejected_nll)
    # Not torch.where of two Python numbers: its result would be float32 for every dtype of the log-probs.
    slope = torch.full_like(rejected_nll, -weight) if mode == "smoothed" else active.to(sum_logp.dtype) * weight
    loss, chosen_slope = chosen_nll + penalty, -torch.ones_like(chosen_nll)
    if mode == "hard":  # a violated constraint is the whole loss, but never hides a NaN of the chosen answers
        alone = active & ~chosen_nll.isnan()
        loss, chosen_slope = torch.where(alone, penalty, loss), torch.where(alone, 0.0, chosen_slope)

    grad_sum_logp = torch.cat([chosen_slope * share[:pairs], slope * share[pairs:]])
    grad_logp = to_tokens(grad_sum_logp.to(logp.dtype), labelled, cu_seqlens)
    # Clone the scalars, because an op's outputs must not share memory.
    return (
        loss,
        chosen_nll.clone(),
        rejected_nll.clone(),
        penalty,
        sum_logp,
        mean,
        count,
        grad_logp,
    )
