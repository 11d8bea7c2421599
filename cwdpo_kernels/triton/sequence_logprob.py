"""sequence_logprob on a GPU: one program a sequence. Moves 4 N bytes of log-probs and the labels, once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .segments import BLOCK_TOKENS, segment_sum, spread


@triton.jit
def _forward_kernel(
    logp_ptr, labels_ptr, cu_seqlens_ptr, total_ptr, mean_ptr, count_ptr, ignore_index, BLOCK: tl.constexpr
):
    segment_sum(
        logp_ptr, labels_ptr, labels_ptr, cu_seqlens_ptr, total_ptr, mean_ptr, count_ptr, tl.program_id(0),
        ignore_index, True, False, BLOCK,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    grad_total_ptr, grad_mean_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, out_ptr, ignore_index, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0)
    count = tl.maximum(tl.load(count_ptr + sequence), 1).to(tl.float32)
    value = tl.load(grad_total_ptr + sequence) + tl.load(grad_mean_ptr + sequence) / count
    spread(value, out_ptr, labels_ptr, cu_seqlens_ptr, sequence, ignore_index, True, BLOCK)


def sequence_logprob(
    logp: Tensor, labels: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """total, mean, count [S]."""
    sequences = cu_seqlens.shape[0] - 1
    total, mean = logp.new_empty(sequences), logp.new_empty(sequences)
    count = logp.new_empty(sequences, dtype=torch.int64)
    if sequences:
        _forward_kernel[(sequences,)](
            logp.contiguous(), labels.contiguous(), cu_seqlens.contiguous(), total, mean, count, ignore_index,
            BLOCK=BLOCK_TOKENS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return total, mean, count


def sequence_logprob_backward(
    grad_total: Tensor, grad_mean: Tensor, labels: Tensor, count: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> Tensor:
    """d / d logp_t = grad_total + grad_mean / count of the token's sequence; 0 where ignored."""
    out = grad_total.new_empty(labels.shape)
    if count.numel():
        _backward_kernel[(count.numel(),)](
            grad_total.contiguous(), grad_mean.contiguous(), labels.contiguous(), count, cu_seqlens.contiguous(), out,
            ignore_index, BLOCK=BLOCK_TOKENS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return out
