"""Stage 1: NLL of the chosen answers plus a gentle term on the rejected ones, and its gradient for every token.

    hinge:     loss = NLL(y+) + weight * relu(nll_floor - NLL(y-))
    smoothed:  loss = NLL(y+) + weight * NLL(y-)        (label smoothing is added by the caller: no vocabulary pass)

NLL(.) is the mean over the batch's non-empty answers of their NLL per token (or per sequence).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cwdpo_loss import sequence_sums
from .sequence_logprob import to_tokens


def constrained_sft_loss(
    logp: Tensor, labels: Tensor | None, count: Tensor | None, cu_seqlens: Tensor, weight: float, nll_floor: float,
    hinge: bool, per_token: bool, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, chosen_nll, rejected_nll, penalty, total, mean, count, grad_logp)."""
    total, mean, count, labelled = sequence_sums(logp, labels, count, cu_seqlens, ignore_index)
    pairs = total.shape[0] // 2
    length = count.clamp_min(1) if per_token else torch.ones_like(count)
    used = (count > 0).view(2, pairs)
    share = used.to(total.dtype) / used.sum(1, keepdim=True).clamp_min(1)
    share = share.flatten() / length
    nll = (-total * share).to(total.dtype)
    chosen_nll, rejected_nll = nll[:pairs].sum(), nll[pairs:].sum()

    shortfall = nll_floor - rejected_nll
    # No rejected answer at all: nothing to hold down, whatever the floor.
    active = used[1].any() & (shortfall > 0)
    penalty = torch.where(active, weight * shortfall, 0.0) if hinge else weight * rejected_nll
    # A product with the mask: torch.where of two numbers would be float32, whatever the log-probs are.
    slope = active.to(total.dtype) * weight if hinge else torch.full_like(rejected_nll, -weight)

    grad_total = torch.cat([-share[:pairs], slope * share[pairs:]])
    grad_logp = to_tokens(grad_total.to(logp.dtype), labelled, cu_seqlens)
    # The scalars come from one unbind: as outputs of an op each needs memory of its own.
    return (
        chosen_nll + penalty,
        chosen_nll.clone(),
        rejected_nll.clone(),
        penalty,
        total,
        mean,
        count,
        grad_logp,
    )
