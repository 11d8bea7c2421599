"""From token log-probabilities to sums, means and counts of packed sequences [S].

Wrong offsets are refused on a CPU; elsewhere reading them would sync the device. So no function here trusts them: if
they do not rise from 0 to N, sums, means and gradients are NaN, and counts are 1, because a loss leaves out answers of
length 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logprob(
    logp: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sequence: sum_logp over labeled tokens, mean = sum_logp / count (0 if it has none), count of the tokens."""
    labeled = labels != ignore_index
    sum_logp, count = sums_and_counts(logp, labeled, cu_seqlens)
    return sum_logp, mean_of(sum_logp, count), count


def sequence_logprob_backward(
    grad_sum_logp: Tensor,
    grad_mean: Tensor,
    labels: Tensor,
    count: Tensor,
    cu_seqlens: Tensor,
    ignore_index: int,
) -> Tensor:
    """grad_logp of a token = grad_sum_logp + grad_mean / count of its sequence; 0 where ignored."""
    grad_sequence = grad_sum_logp + grad_mean / count.clamp_min(1)
    return to_tokens(grad_sequence, labels != ignore_index, cu_seqlens)


def sums_and_counts(
    logp_N: Tensor, labeled_N: Tensor, cu_seqlens: Tensor, count_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """sum_logp [S] of the labeled tokens and their count [S], or a copy of the given one."""
    offsets, fit = checked(cu_seqlens, logp_N.numel())
    sum_logp_S = segment_sum(torch.where(labeled_N, logp_N, 0.0), offsets).to(logp_N.dtype)
    if count_S is None:
        count_S = segment_sum(labeled_N, offsets).long()
    return torch.where(fit, sum_logp_S, torch.nan), torch.where(fit, count_S, 1)


def segment_sum(values_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment, in a fixed order and in float64, so that rounding does not grow with its length."""
    return torch.segment_reduce(values_N.double(), "sum", offsets=offsets, initial=0.0)


def mean_of(sum_logp_S: Tensor, count_S: Tensor) -> Tensor:
    return sum_logp_S / count_S.clamp_min(1)


def to_tokens(values_S: Tensor, mask_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token gets its sequence's value where the mask is True, else 0."""
    offsets, fit = checked(cu_seqlens, mask_N.numel())
    values_N = torch.where(fit, values_S, torch.nan).repeat_interleave(offsets.diff(), output_size=mask_N.numel())
    return torch.where(mask_N, values_N, 0.0)


def checked(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(offsets in int64, whether they fit: rise from 0 to `tokens`). Others are replaced: sequence 0 has all tokens."""
    offsets = cu_seqlens.long()
    fit = (offsets[0] == 0) & (offsets[-1] == tokens) & (offsets.diff() >= 0).all()
    replaced = torch.full_like(offsets, tokens)
    replaced[0] = 0
    return torch.where(fit, offsets, replaced), fit
