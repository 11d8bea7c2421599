"""softmax_sums on a GPU: one sweep with statistics, then one kernel that merges the tiles of each token.

With y the label, and sums and maxima over its competitors v != y but for the last,

    target = z_y                 max_logit = max z_v             sum_exp = sum u_v,   u_v = exp(z_v - max_logit)
    moment = sum u_v log u_v     sum_sq = sum u_v^2              sum_logit = sum of all z_v, label included

The sweep's sums are relative to an anchor, an integer in units of ln 2 (see primitives.py), and so are the exponentials
of backward (gradients.py). With d = anchor ln 2 - max_logit and x_v = z_v - anchor ln 2, of which u_v = e^d e^(x_v),

    u_v (exp_factor + log_factor log u_v) = e^(x_v) (e^d (exp_factor + log_factor d) + e^d log_factor x_v)

2 N D V floating-point operations, or 4 N D V with a frozen head's direction (direction.py). 6 N D V in backward, which
recomputes all tiles: those of a trainable head's log-prob hold exponentials in the dtype of the inputs, and this
gradient needs logits. Bytes moved: the operands and 48 N T.
The sweep skips blocks of ignored tokens, and the gradient kernel blocks of tokens without a gradient. The GEMMs of
backward are dense.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .direction import new_direction, sweep_with_direction
from .gradients import LogitGrads, head_gradients
from .primitives import LN2, LN2_HI, LN2_LO, LOG2E, MAX_ANCHOR, NO_ANCHOR, log2_anchored, merge
from .sweep import Sweep

SUMS = 6  # target, max_logit, sum_exp, moment, sum_sq, sum_logit
BLOCK_N, BLOCK_T = 32, 8
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # max_logit without competitors


@triton.jit
def _sums_kernel(
    anchor_TN_ptr, sum_exp_TN_ptr, statistics_T4N_ptr, target_ptr, labels_ptr, sums_ptr, N, V, tiles, ignore_index,
    PARTIAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The six sums [6, N], 0 where ignored. PARTIAL: a label outside [0, V) has the target 0, not NaN."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index)
    labelled = mask_n & (labels != ignore_index)
    anchor = tl.full((BLOCK_N,), NO_ANCHOR, tl.float32)
    sum_exp = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)  # sum u log2(u), u = exp(z - anchor ln 2)
    sum_sq = tl.zeros((BLOCK_N,), tl.float32)
    sum_logit = tl.zeros((BLOCK_N,), tl.float32)
    max_logit = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for tile in range(0, tiles, BLOCK_T):
        offs_t = tile + tl.arange(0, BLOCK_T)
        offs = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_t < tiles)[:, None] & labelled[None, :]
        anchors = tl.load(anchor_TN_ptr + offs, mask=mask, other=NO_ANCHOR)
        sums_exp = tl.load(sum_exp_TN_ptr + offs, mask=mask, other=0.0)
        statistics = statistics_T4N_ptr + offs_t.to(tl.int64)[:, None] * 4 * N + offs_n[None, :]
        max_logit = tl.maximum(max_logit, tl.max(tl.load(statistics, mask=mask, other=float("-inf")), 0))
        moments = tl.load(statistics + N, mask=mask, other=0.0)
        sums_sq = tl.load(statistics + 2 * N, mask=mask, other=0.0)
        sum_logit += tl.sum(tl.load(statistics + 3 * N, mask=mask, other=0.0), 0)
        max_anchor = tl.max(anchors, 0)
        block_sum = tl.sum(sums_exp * tl.exp2(anchors - max_anchor[None, :]), 0)
        new_anchor, new_sum_exp = merge(anchor, sum_exp, max_anchor, block_sum)
        shift, shifts = anchor - new_anchor, anchors - new_anchor[None, :]
        moment = _rescaled(moment, sum_exp, shift) + tl.sum(_rescaled(moments, sums_exp, shifts), 0)
        sum_sq = sum_sq * tl.exp2(2 * shift) + tl.sum(sums_sq * tl.exp2(2 * shifts), 0)
        anchor, sum_exp = new_anchor, new_sum_exp

    target = tl.load(target_ptr + offs_n, mask=labelled, other=0.0)
    if PARTIAL:
        target = tl.where((labels >= 0) & (labels < V), target, 0.0)
    # Change from the anchor to max_logit, which is up to 1 (in units of ln 2) below it.
    log2_max = tl.where(sum_exp != 0, log2_anchored(max_logit, anchor), 0.0)
    largest = tl.exp2(log2_max)
    moment = LN2 * (moment - log2_max * sum_exp) / largest
    # If all competitors are below every anchor, their sum is lost. For a label above them it does not matter.
    lost = (sum_exp == 0) & (max_logit > float("-inf")) & (target <= NO_ANCHOR * LN2)
    sum_exp = tl.where(lost, float("nan"), sum_exp / largest)
    sums = sums_ptr + offs_n
    tl.store(sums, tl.where(labelled, target, 0.0), mask=mask_n)
    tl.store(sums + N, tl.where(labelled, tl.maximum(max_logit, LOWEST), 0.0), mask=mask_n)
    tl.store(sums + 2 * N, tl.where(labelled, sum_exp, 0.0), mask=mask_n)
    tl.store(sums + 3 * N, tl.where(labelled, moment, 0.0), mask=mask_n)
    tl.store(sums + 4 * N, tl.where(labelled, sum_sq / (largest * largest), 0.0), mask=mask_n)
    tl.store(sums + 5 * N, tl.where(labelled, sum_logit, 0.0), mask=mask_n)


@triton.jit
def _rescaled(moment, sum_exp, shift):
    """The moment sum u log2(u) after every u is multiplied by 2^shift; 0 if that underflows."""
    return tl.where(shift > -200.0, tl.exp2(shift) * (moment + tl.maximum(shift, -200.0) * sum_exp), 0.0)


def softmax_sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, partial: bool, with_direction: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums [6, N], 0 where ignored, direction [N, D] (or empty) and memory in which nothing is kept."""
    opaque = kept_bytes is not None and kept_bytes >= 0
    kept = hidden.new_empty(kept_bytes or 0, dtype=torch.uint8) if opaque else torch.empty_like(weight)
    if kept_bytes is None or kept_bytes >= 0:
        kept.zero_()
    sweep = Sweep(hidden, weight, bias, labels.contiguous(), scale, softcap, ignore_index, statistics=True)
    if with_direction:
        *_, direction = sweep_with_direction(sweep, workspace_bytes)
    else:
        direction = new_direction(hidden, 0)
        sweep.run(range(sweep.tiles_v))
    sums = hidden.new_empty(SUMS, sweep.rows, dtype=torch.float32)
    if sweep.rows:
        _sums_kernel[(triton.cdiv(sweep.rows, BLOCK_N),)](
            sweep.anchor_TN, sweep.sum_exp_TN, sweep.statistics_T4N, sweep.target_N, sweep.labels, sums, sweep.rows,
            sweep.vocab, sweep.tiles_v, ignore_index, PARTIAL=partial, BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return sums, direction, kept


def softmax_sums_backward(
    grad_target: Tensor, exp_factor: Tensor, log_factor: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, max_logit: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    partial: bool, needs_hidden: bool, needs_weight: bool, needs_bias: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V]; empty where not needed. `kept` is not read.

    The gradient of a token's unscaled logits is grad_target at the label and u_v (exp_factor + log_factor log u_v)
    elsewhere.
    """
    grads = _anchored(grad_target, exp_factor, log_factor, max_logit, labels != ignore_index)
    nothing_kept = hidden.new_empty(0, dtype=torch.uint8)
    return head_gradients(
        hidden, weight, bias, labels, grads, nothing_kept, scale, softcap, needs_hidden, needs_weight, needs_bias,
        False, workspace_bytes, grad_weight,
    )  # fmt: skip


def softmax_sums_backward_(
    grad_target: Tensor, exp_factor: Tensor, log_factor: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, max_logit: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    partial: bool, needs_hidden: bool, needs_bias: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and bias; the weight's gradient is written to `kept` [V, D]."""
    grad_hidden, _, grad_bias = softmax_sums_backward(
        grad_target, exp_factor, log_factor, hidden, weight, bias, labels, max_logit, kept, scale, softcap,
        ignore_index, partial, needs_hidden, True, needs_bias, workspace_bytes, grad_weight=kept,
    )  # fmt: skip
    return grad_hidden, grad_bias


def _anchored(
    grad_target: Tensor, exp_factor: Tensor, log_factor: Tensor, max_logit: Tensor, labelled: Tensor
) -> LogitGrads:
    """Converts factors for exponentials relative to `max_logit` into factors for exponentials at its anchor."""
    in_range = max_logit.abs() < MAX_ANCHOR.value * LN2.value  # else no competitors, or their sum is NaN
    anchor = torch.where(in_range, torch.ceil(max_logit * LOG2E.value), NO_ANCHOR.value)
    d = torch.where(in_range, (anchor * LN2_HI.value - max_logit) + anchor * LN2_LO.value, 0.0)
    grads = grad_target, torch.exp(d) * (exp_factor + log_factor * d), torch.exp(d) * LN2.value * log_factor
    grad_target, exp_factor, log_factor = (torch.where(labelled, x, 0.0) for x in grads)
    return LogitGrads(anchor, grad_target, exp_factor, log_factor)
