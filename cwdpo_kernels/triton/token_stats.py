"""token_stats on a GPU: one sweep with statistics, then a few operations a token (see portable/token_stats.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .primitives import LN2, NO_ANCHOR, join, log1p, log2_anchored, logp_of
from .sweep import Sweep

BLOCK_N, BLOCK_T = 32, 32


@triton.jit
def _statistics_kernel(
    anchor_TN_ptr, total_TN_ptr, moment_TN_ptr, peak_TN_ptr, target_ptr, labels_ptr, logp_ptr, entropy_ptr,
    top1_prob_ptr, is_top1_ptr, N, tiles, ignore_index, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Join the tiles; with M the competitors' peak, m = max(M, c), Z = sum exp(z_v - m) over the whole vocabulary,

    entropy = log Z - (1 / Z) sum exp(z_v - m) (z_v - m),   top-1 probability = 1 / Z.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labelled = mask_n & (tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index) != ignore_index)
    anchor = tl.full((BLOCK_N,), NO_ANCHOR, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)  # sum u log2(u), u = exp(z - anchor ln 2)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for tile in range(0, tiles, BLOCK_T):
        offs_t = tile + tl.arange(0, BLOCK_T)
        offs = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_t < tiles)[:, None] & labelled[None, :]
        anchors = tl.load(anchor_TN_ptr + offs, mask=mask, other=NO_ANCHOR)
        totals = tl.load(total_TN_ptr + offs, mask=mask, other=0.0)
        moments = tl.load(moment_TN_ptr + offs, mask=mask, other=0.0)
        peak = tl.maximum(peak, tl.max(tl.load(peak_TN_ptr + offs, mask=mask, other=float("-inf")), 0))
        best = tl.max(anchors, 0)
        joined, joined_total = join(anchor, total, best, tl.sum(totals * tl.exp2(anchors - best[None, :]), 0))
        shift, shifts = anchor - joined, anchors - joined[None, :]
        moment = _moved(moment, total, shift) + tl.sum(_moved(moments, totals, shifts), 0)
        anchor, total = joined, joined_total

    target = tl.load(target_ptr + offs_n, mask=labelled, other=0.0)
    # To the true peak: its own u is 2^top, an anchor lies up to one power of two above it.
    has_competitor = total > 0
    top = tl.where(has_competitor, log2_anchored(peak, anchor), 0.0)
    total_M = total * tl.exp2(-top)
    moment_M = LN2 * (moment - top * total) * tl.exp2(-top)
    lead = tl.where(has_competitor, peak - target, -1e30)  # of the best competitor over the label
    m = tl.maximum(lead, 0.0)
    # Z - 1, the weight of everything but the top token, so that log Z keeps its digits when Z is close to 1.
    rest = tl.where(lead > 0, (total_M - 1.0) + tl.exp(-m), tl.exp(lead - m) * total_M)
    rest = tl.maximum(rest, 0.0)
    shifted = tl.exp(lead - m) * (moment_M + (lead - m) * total_M) - tl.exp(-m) * m
    shifted = tl.where(has_competitor, shifted, 0.0)
    entropy = tl.maximum(log1p(rest) - shifted / (1.0 + rest), 0.0)
    tl.store(logp_ptr + offs_n, tl.where(labelled, logp_of(target, anchor, total), 0.0), mask=mask_n)
    tl.store(entropy_ptr + offs_n, tl.where(labelled, entropy, 0.0), mask=mask_n)
    tl.store(top1_prob_ptr + offs_n, tl.where(labelled, 1.0 / (1.0 + rest), 0.0), mask=mask_n)
    tl.store(is_top1_ptr + offs_n, labelled & (lead <= 0), mask=mask_n)


@triton.jit
def _moved(moment, total, shift):
    """sum u log2(u) after every u became u * 2^shift; 0 where nothing is left."""
    return tl.where(shift > -200.0, tl.exp2(shift) * (moment + tl.maximum(shift, -200.0) * total), 0.0)


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
            sweep.anchor_TN, sweep.total_TN, sweep.moment_TN, sweep.peak_TN, sweep.target_N, sweep.labels, logp,
            entropy, top1_prob, is_top1, sweep.rows, sweep.tiles_v, ignore_index, BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return logp, entropy, top1_prob, is_top1
