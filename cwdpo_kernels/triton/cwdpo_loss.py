"""cwdpo_loss on a GPU: sums, cooling weights, loss, metrics and the gradient of every token, in one launch.

portable/cwdpo_loss.py states the formulas. Bytes moved: 12 read and 4 written per token; the labels are read twice, the
second time from the cache. One program handles all sequences: a batch has at most about ten thousand labelled tokens,
which takes less time than a second launch.
Legend: P pairs, 2P sequences (chosen first), N tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .primitives import sigmoid, softplus
from .segments import BLOCK_TOKENS, all_segment_sums, broadcast_all, offsets_fit


@triton.jit
def _cwdpo_kernel(
    logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, ref_chosen_ptr, ref_rejected_ptr,
    loss_ptr, chosen_reward_ptr, rejected_reward_ptr, margin_ptr, accuracy_ptr, cooling_weight_ptr, kept_ptr,
    sum_logp_ptr, mean_ptr, count_out_ptr, grad_logp_ptr, grad_sum_logp_ptr, P, N, beta, logp_floor, temperature,
    constant, drop_below, ignore_index, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr, HAS_CONSTANT: tl.constexpr,
    HAS_DROP: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    fit = offsets_fit(cu_seqlens_ptr, 2 * P, N, BLOCK)
    all_segment_sums(
        logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_out_ptr, 2 * P, N, fit,
        ignore_index, HAS_LABELS, HAS_COUNT, BLOCK,
    )  # fmt: skip
    offs = tl.arange(0, BLOCK_P)
    mask = offs < P
    count_chosen = tl.load(count_out_ptr + offs, mask=mask, other=0)
    count_rejected = tl.load(count_out_ptr + P + offs, mask=mask, other=0)
    mean_rejected = tl.load(mean_ptr + P + offs, mask=mask, other=0.0)
    ratio_chosen = tl.load(sum_logp_ptr + offs, mask=mask, other=0.0)
    ratio_chosen -= tl.load(ref_chosen_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    ratio_rejected = tl.load(sum_logp_ptr + P + offs, mask=mask, other=0.0)
    ratio_rejected -= tl.load(ref_rejected_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    length_chosen = tl.zeros((BLOCK_P,), tl.float32) + 1.0
    length_rejected = length_chosen
    if PER_TOKEN:
        length_chosen = tl.maximum(count_chosen, 1).to(tl.float32)
        length_rejected = tl.maximum(count_rejected, 1).to(tl.float32)
        ratio_chosen /= length_chosen
        ratio_rejected /= length_rejected

    cooling_weight = sigmoid((mean_rejected - logp_floor) / temperature)
    if HAS_CONSTANT:
        cooling_weight = tl.zeros((BLOCK_P,), tl.float32) + constant
    kept = mask & (count_chosen > 0) & (count_rejected > 0)
    if HAS_DROP:
        kept &= (mean_rejected >= drop_below) | (mean_rejected != mean_rejected)  # a broken answer stays visible
    kept_pairs = tl.maximum(tl.sum(kept.to(tl.int32), 0), 1).to(tl.float32)
    # A weight of 0 leaves out an impossible negative (0 * -inf), but not NaN.
    absent = (cooling_weight == 0) & (tl.abs(ratio_rejected) == float("inf"))
    logit = beta * (ratio_chosen - tl.where(absent, 0.0, cooling_weight * ratio_rejected))
    tl.store(loss_ptr, tl.sum(tl.where(kept, softplus(-logit), 0.0), 0) / kept_pairs)
    # d loss / d D_w = -coeff, d loss / d D_l = coeff * w_c
    coeff = tl.where(kept, beta * sigmoid(-logit), 0.0) / kept_pairs
    tl.store(grad_sum_logp_ptr + offs, -coeff / length_chosen, mask=mask)
    tl.store(grad_sum_logp_ptr + P + offs, coeff * cooling_weight / length_rejected, mask=mask)

    margin = beta * ratio_chosen - beta * ratio_rejected
    tl.store(chosen_reward_ptr + offs, beta * ratio_chosen, mask=mask)
    tl.store(rejected_reward_ptr + offs, beta * ratio_rejected, mask=mask)
    tl.store(margin_ptr + offs, margin, mask=mask)
    tl.store(accuracy_ptr + offs, tl.where(margin > 0, 1.0, 0.0), mask=mask)
    tl.store(cooling_weight_ptr + offs, cooling_weight, mask=mask)
    tl.store(kept_ptr + offs, kept, mask=mask)
    broadcast_all(
        grad_sum_logp_ptr, grad_logp_ptr, labels_ptr, cu_seqlens_ptr, 2 * P, N, fit, ignore_index, HAS_LABELS, BLOCK
    )


def cwdpo_loss(
    logp: Tensor, labels: Tensor | None, count: Tensor | None, cu_seqlens: Tensor, ref_chosen: Tensor,
    ref_rejected: Tensor, beta: float, logp_floor: float, temperature: float, constant: float | None,
    drop_below: float | None, per_token: bool, ignore_index: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of the op in the order of its schema: loss, five metrics and kept [P], sums [2P], grad_logp [N]."""
    pairs = (cu_seqlens.shape[0] - 1) // 2
    loss = logp.new_zeros(())
    per_pair = [logp.new_empty(pairs) for _ in range(5)]  # chosen and rejected reward, margin, accuracy, cooling weight
    kept = logp.new_empty(pairs, dtype=torch.bool)
    sum_logp, mean, grad_sum_logp = (logp.new_empty(2 * pairs) for _ in range(3))
    count_out = logp.new_empty(2 * pairs, dtype=torch.int64)
    grad_logp = torch.zeros_like(logp) if pairs == 0 else torch.empty_like(logp)
    if pairs:
        _cwdpo_kernel[(1,)](
            logp.contiguous(), logp if labels is None else labels.contiguous(),
            logp if count is None else count.contiguous(), cu_seqlens.contiguous(), ref_chosen.contiguous(),
            ref_rejected.contiguous(), loss, *per_pair, kept, sum_logp, mean, count_out, grad_logp, grad_sum_logp,
            pairs, logp.numel(), beta, logp_floor, temperature, 0.0 if constant is None else constant,
            0.0 if drop_below is None else drop_below, ignore_index, HAS_LABELS=labels is not None,
            HAS_COUNT=count is not None, HAS_CONSTANT=constant is not None, HAS_DROP=drop_below is not None,
            PER_TOKEN=per_token, BLOCK_P=triton.next_power_of_2(pairs), BLOCK=BLOCK_TOKENS, num_warps=8,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return loss, *per_pair, kept, sum_logp, mean, count_out, grad_logp
