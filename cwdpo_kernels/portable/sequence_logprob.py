"""From token log-probabilities to totals, means and counts of packed sequences [S]."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logprob(
    logp: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """total = sum of the labelled tokens' logp, count of them, mean = total / count (0 for an empty sequence)."""
    labelled = labels != ignore_index
    total = segment_sum(torch.where(labelled, logp, 0.0), cu_seqlens).to(logp.dtype)
    count = segment_sum(labelled, cu_seqlens).long()
    return total, mean_of(total, count), count


def sequence_logprob_backward(
    grad_total: Tensor,
    grad_mean: Tensor,
    labels: Tensor,
    count: Tensor,
    cu_seqlens: Tensor,
    ignore_index: int,
) -> Tensor:
    """d / d logp_t = grad_total + grad_mean / count of the token's sequence; 0 where ignored."""
    grad_sequence = grad_total + grad_mean / count.clamp_min(1)
    return to_tokens(grad_sequence, labels != ignore_index, cu_seqlens)


def segment_sum(values_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each segment in float64: a fixed order, and no rounding that grows with the sequence's length."""
    return torch.segment_reduce(values_N.double(), "sum", offsets=cu_seqlens.long(), initial=0.0)


def mean_of(total_S: Tensor, count_S: Tensor) -> Tensor:
    return total_S / count_S.clamp_min(1)


def to_tokens(values_S: Tensor, mask_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each sequence's value at its tokens where `mask` holds, 0 elsewhere."""
    values_N = values_S.repeat_interleave(cu_seqlens.long().diff(), output_size=mask_N.numel())
    return torch.where(mask_N, values_N, 0.0)
