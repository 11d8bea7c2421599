"""sequence_logprob on a GPU: sum, mean and count of the log-probs of each sequence, one program per sequence.

Bytes moved: 12 N in forward (log-probs and labels) and in backward (labels and gradients).
Legend: N tokens, S sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .segments import BLOCK_TOKENS, broadcast, offsets_fit, segment_sum


@triton.jit
def _forward_kernel(
    logp_ptr, labels_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_ptr, S, N, ignore_index, BLOCK: tl.constexpr
):
    fit = offsets_fit(cu_seqlens_ptr, S, N, BLOCK)
    segment_sum(
        logp_ptr, labels_ptr, labels_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_ptr, tl.program_id(0), N, fit,
        ignore_index, True, False, BLOCK,
    )  # fmt: skip


def sequence_logprob(
    logp: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_logp, mean and count [S]; NaN, NaN and 1 if `cu_seqlens` do not rise from 0 to N."""
    sequences = cu_seqlens.shape[0] - 1
    sum_logp, mean = logp.new_empty(sequences), logp.new_empty(sequences)
    count = logp.new_empty(sequences, dtype=torch.int64)
    if sequences:
        _forward_kernel[(sequences,)](
            logp.contiguous(), labels.contiguous(), cu_seqlens.contiguous(), sum_logp, mean, count,
            sequences, logp.numel(), ignore_index, BLOCK=BLOCK_TOKENS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return sum_logp, mean, count


@triton.jit
def _backward_kernel(
    grad_sum_logp_ptr, grad_mean_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, out_ptr, S, N, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    count = tl.maximum(tl.load(count_ptr + sequence), 1).to(tl.float32)
    value = tl.load(grad_sum_logp_ptr + sequence) + tl.load(grad_mean_ptr + sequence) / count
    fit = offsets_fit(cu_seqlens_ptr, S, N, BLOCK)
    broadcast(value, out_ptr, labels_ptr, cu_seqlens_ptr, sequence, N, fit, ignore_index, True, BLOCK)


def sequence_logprob_backward(
    grad_sum_logp: Tensor, grad_mean: Tensor, labels: Tensor, count: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> Tensor:
    """grad_logp [N] = grad_sum_logp + grad_mean / count of the token's sequence; 0 where ignored.

    NaN at every labeled token if `cu_seqlens` do not rise from 0 to N.
    """
    out = grad_sum_logp.new_empty(labels.shape)
    if count.numel():
        _backward_kernel[(count.numel(),)](
            grad_sum_logp.contiguous(), grad_mean.contiguous(), labels.contiguous(), count, cu_seqlens.contiguous(),
            out, count.numel(), labels.numel(), ignore_index, BLOCK=BLOCK_TOKENS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out
