"""From token log-probabilities to sums, means and counts of packed sequences [S]."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logprob(
    logp: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sequence: sum_logp over labeled tokens, mean = sum_logp / count (0 if it has none), count of the tokens."""
    labeled = labels != ignore_index
    sum_logp = segment_sum(torch.where(labeled, logp, 0.0), cu_seqlens).to(logp.dtype)
    count = segment_sum(labeled, cu_seqlens).long()
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


def segment_sum(values_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each segment, in a fixed order and in float64, so that rounding does not grow with its length."""
    return torch.segment_reduce(values_N.double(), "sum", offsets=cu_seqlens.long(), initial=0.0)


def mean_of(sum_logp_S: Tensor, count_S: Tensor) -> Tensor:
    return sum_logp_S / count_S.clamp_min(1)


def to_tokens(values_S: Tensor, mask_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token gets its sequence's value where the mask is True, else 0."""
    values_N = values_S.repeat_interleave(cu_seqlens.long().diff(), output_size=mask_N.numel())
    return torch.where(mask_N, values_N, 0.0)
