"""constrained_sft_loss on a GPU: sums, both terms and the gradient of every token, in one launch of one program.

portable/constrained_sft_loss.py states the formulas. Bytes moved: 16 per token (see cwdpo_loss.py).
Legend: P pairs, 2P sequences (chosen first), N tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .segments import BLOCK_TOKENS, all_segment_sums, broadcast_all, offsets_fit


@triton.jit
def _mean_nll(sum_logp_ptr, count_ptr, offs, mask, PER_TOKEN: tl.constexpr):
    """(mean NLL of the non-empty sequences, d mean NLL / d NLL of each sequence, number of non-empty sequences)."""
    count = tl.load(count_ptr + offs, mask=mask, other=0)
    sum_logp = tl.load(sum_logp_ptr + offs, mask=mask, other=0.0)
    non_empty = count > 0
    n_non_empty = tl.sum(non_empty.to(tl.int32), 0)
    share = tl.where(non_empty, 1.0, 0.0) / tl.maximum(n_non_empty, 1).to(tl.float32)
    if PER_TOKEN:
        share /= tl.maximum(count, 1).to(tl.float32)
    return tl.sum(tl.where(non_empty, -sum_logp * share, 0.0), 0), share, n_non_empty


@triton.jit
def _sft_kernel(
    logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, loss_ptr, chosen_nll_ptr, rejected_nll_ptr, penalty_ptr,
    sum_logp_ptr, mean_ptr, count_out_ptr, grad_logp_ptr, grad_sum_logp_ptr, P, N, weight, nll_floor, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr, MODE: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = offsets_fit(cu_seqlens_ptr, 2 * P, N, BLOCK)
    all_segment_sums(
        logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_out_ptr, 2 * P, N, fit,
        ignore_index, HAS_LABELS, HAS_COUNT, BLOCK,
    )  # fmt: skip
    offs = tl.arange(0, BLOCK_P)
    mask = offs < P
    chosen_nll, chosen_share, _ = _mean_nll(sum_logp_ptr, count_out_ptr, offs, mask, PER_TOKEN)
    rejected_nll, rejected_share, n_rejected = _mean_nll(sum_logp_ptr + P, count_out_ptr + P, offs, mask, PER_TOKEN)
    # A weight of 0 leaves out impossible negatives (0 * inf).
    penalty = tl.where((weight == 0) & (rejected_nll == float("inf")), 0.0, weight * rejected_nll)
    slope = -weight
    if MODE != "smoothed":
        # Without a rejected answer the penalty is 0, even if the floor is positive. NaN is active, to stay visible.
        active = (n_rejected > 0) & ((nll_floor > rejected_nll) | (rejected_nll != rejected_nll))
        penalty = tl.where(active, weight * (nll_floor - rejected_nll), 0.0)
        slope = tl.where(active, weight, 0.0)
    loss = chosen_nll + penalty
    if MODE == "hard":  # a violated constraint is the whole loss, but never hides a NaN of the chosen answers
        alone = active & (chosen_nll == chosen_nll)
        loss = tl.where(alone, penalty, loss)
        chosen_share = tl.where(alone, 0.0, chosen_share)
    tl.store(loss_ptr, loss)
    tl.store(chosen_nll_ptr, chosen_nll)
    tl.store(rejected_nll_ptr, rejected_nll)
    tl.store(penalty_ptr, penalty)
    tl.store(grad_sum_logp_ptr + offs, -chosen_share, mask=mask)
    tl.store(grad_sum_logp_ptr + P + offs, slope * rejected_share, mask=mask)
    broadcast_all(
        grad_sum_logp_ptr, grad_logp_ptr, labels_ptr, cu_seqlens_ptr, 2 * P, N, fit, ignore_index, HAS_LABELS, BLOCK
    )


def constrained_sft_loss(
    logp: Tensor, labels: Tensor | None, count: Tensor | None, cu_seqlens: Tensor, weight: float, nll_floor: float,
    mode: str, per_token: bool, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, chosen_nll, rejected_nll, penalty, sum_logp, mean, count, grad_logp)."""
    pairs = (cu_seqlens.shape[0] - 1) // 2
    scalars = [logp.new_zeros(()) for _ in range(4)]
    sum_logp, mean, grad_sum_logp = (logp.new_empty(2 * pairs) for _ in range(3))
    count_out = logp.new_empty(2 * pairs, dtype=torch.int64)
    grad_logp = torch.zeros_like(logp) if pairs == 0 else torch.empty_like(logp)
    if pairs:
        _sft_kernel[(1,)](
            logp.contiguous(), logp if labels is None else labels.contiguous(),
            logp if count is None else count.contiguous(), cu_seqlens.contiguous(), *scalars, sum_logp, mean, count_out,
            grad_logp, grad_sum_logp, pairs, logp.numel(), 1.0 if mode == "hard" else weight, nll_floor, ignore_index,
            HAS_LABELS=labels is not None, HAS_COUNT=count is not None, MODE=mode, PER_TOKEN=per_token,
            BLOCK_P=triton.next_power_of_2(pairs), BLOCK=BLOCK_TOKENS, num_warps=8, **COMPILER_OPTIONS,
        )  # fmt: skip
    return *scalars, sum_logp, mean, count_out, grad_logp
