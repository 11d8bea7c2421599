"""token_stats on a GPU: one sweep with statistics, then one kernel that merges the tiles of each token.

With M the largest logit of the label's competitors (all v != y), m = max(M, z_y) and Z = sum_v exp(z_v - m):

    entropy = log Z - (1 / Z) sum_v exp(z_v - m) (z_v - m)        top-1 probability = 1 / Z

2 N D V floating-point operations. Bytes moved: the operands and 32 N T.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .primitives import LN2, NO_ANCHOR, log1p, log2_anchored, logp_of, merge
from .sweep import Sweep

BLOCK_N, BLOCK_T = 32, 32
NEGLIGIBLE = tl.constexpr(200.0)  # nats: exp(-NEGLIGIBLE) is 0 in float32, but 0 * inf would be NaN


@triton.jit
def _statistics_kernel(
    anchor_TN_ptr, sum_exp_TN_ptr, moment_TN_ptr, max_logit_TN_ptr, target_ptr, labels_ptr, logp_ptr, entropy_ptr,
    top1_prob_ptr, is_top1_ptr, N, tiles, ignore_index, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labelled = mask_n & (tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index) != ignore_index)
    anchor = tl.full((BLOCK_N,), NO_ANCHOR, tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)  # sum u log2(u), u = exp(z - anchor ln 2)
    max_logit = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for tile in range(0, tiles, BLOCK_T):
        offs_t = tile + tl.arange(0, BLOCK_T)
        offs = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_t < tiles)[:, None] & labelled[None, :]
        anchors = tl.load(anchor_TN_ptr + offs, mask=mask, other=NO_ANCHOR)
        sums_exp = tl.load(sum_exp_TN_ptr + offs, mask=mask, other=0.0)
        moments = tl.load(moment_TN_ptr + offs, mask=mask, other=0.0)
        max_logits = tl.load(max_logit_TN_ptr + offs, mask=mask, other=float("-inf"))
        max_logit = tl.maximum(max_logit, tl.max(max_logits, 0))
        max_anchor = tl.max(anchors, 0)
        block_sum = tl.sum(sums_exp * tl.exp2(anchors - max_anchor[None, :]), 0)
        new_anchor, new_sum_exp = merge(anchor, sum_exp, max_anchor, block_sum)
        shift, shifts = anchor - new_anchor, anchors - new_anchor[None, :]
        moment = _rescaled(moment, sum_exp, shift) + tl.sum(_rescaled(moments, sums_exp, shifts), 0)
        anchor, sum_exp = new_anchor, new_sum_exp

    target = tl.load(target_ptr + offs_n, mask=labelled, other=0.0)
    # Change from the anchor, which is up to 1 (in units of ln 2) above M, to M itself.
    has_competitor = sum_exp != 0
    log2_M = tl.where(has_competitor, log2_anchored(max_logit, anchor), 0.0)
    sum_exp_M = sum_exp * tl.exp2(-log2_M)
    moment_M = LN2 * (moment - log2_M * sum_exp) * tl.exp2(-log2_M)
    # M and m, both relative to the target logit.
    M = tl.where(has_competitor, max_logit - target, -1e30)
    m = tl.maximum(M, 0.0)
    # Z - 1 is computed directly: it leaves the top token out, so log Z keeps its digits when Z is close to 1.
    below = tl.minimum(M, 0.0)  # M - m
    z_minus_1 = tl.where(M > 0, (sum_exp_M - 1.0) + tl.exp(-m), tl.exp(below) * sum_exp_M)
    z_minus_1 = tl.maximum(z_minus_1, 0.0)
    moment_m = tl.exp(below) * (moment_M + below * sum_exp_M) - tl.exp(-m) * tl.minimum(m, NEGLIGIBLE)
    moment_m = tl.where(has_competitor, moment_m, 0.0)
    entropy = tl.maximum(log1p(z_minus_1) - moment_m / (1.0 + z_minus_1), 0.0)
    logp = tl.where(labelled, logp_of(target, anchor, sum_exp), 0.0)
    known = logp == logp  # the comparisons above drop NaN
    top1_prob = tl.where(labelled, 1.0 / (1.0 + z_minus_1), 0.0)
    tl.store(logp_ptr + offs_n, logp, mask=mask_n)
    tl.store(entropy_ptr + offs_n, tl.where(known, tl.where(labelled, entropy, 0.0), logp), mask=mask_n)
    tl.store(top1_prob_ptr + offs_n, tl.where(known, top1_prob, logp), mask=mask_n)
    tl.store(is_top1_ptr + offs_n, labelled & known & (M <= 0), mask=mask_n)


@triton.jit
def _rescaled(moment, sum_exp, shift):
    """The moment sum u log2(u) after every u is multiplied by 2^shift; 0 if that underflows."""
    return tl.where(shift > -200.0, tl.exp2(shift) * (moment + tl.maximum(shift, -200.0) * sum_exp), 0.0)


def token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp, entropy, top-1 probability [N] and whether the label is the top-1 (bool [N]); 0 where ignored."""
    sweep = Sweep(hidden, weight, bias, labels.contiguous(), scale, softcap, ignore_index, statistics=True)
    sweep.run(range(sweep.tiles_v))
    logp, entropy, top1_prob = (torch.empty_like(sweep.target_N) for _ in range(3))
    is_top1 = torch.empty_like(logp, dtype=torch.bool)
    if sweep.rows:
        _statistics_kernel[(triton.cdiv(sweep.rows, BLOCK_N),)](
            sweep.anchor_TN, sweep.sum_exp_TN, sweep.moment_TN, sweep.max_logit_TN, sweep.target_N, sweep.labels, logp,
            entropy, top1_prob, is_top1, sweep.rows, sweep.tiles_v, ignore_index, BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return logp, entropy, top1_prob, is_top1
