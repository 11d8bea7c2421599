"""logits_logprob on a GPU: the algebra of portable/logits_logprob.py, with one program per row of logits in forward.

The competitors of a label y are all v != y. With u_v = exp(z_v - anchor ln 2) and sum_exp = sum u_v over them
(anchors: see primitives.py):

    logp = -log1p(exp(anchor ln 2 - z_y) * sum_exp)
    d logp / d z_y = 1 - p_y,   d logp / d z_v = -(1 - p_y) u_v / sum_exp

Bytes moved, with b bytes per logit: N V b in forward and 2 N V b in backward, which can write the gradient over the
logits. Forward does not read rows without a label; backward does not read rows with zero gradient.
Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .primitives import NO_ANCHOR, anchor_of, exp_anchored, logit_gradient, logp_of, merge, or_nan, rounded

FORWARD_BLOCK, BACKWARD_BLOCK, NUM_WARPS = 8192, 4096, 8


@triton.jit
def _forward_kernel(
    logits_ptr, labels_ptr, logp_ptr, anchor_ptr, sum_exp_ptr, V, stride_n, ignore_index, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    zero = tl.full((), 0.0, tl.float32)
    logp, anchor, sum_exp = zero, zero, zero
    if label != ignore_index:
        logits_ptr += row * stride_n
        anchor = tl.full((), NO_ANCHOR, tl.float32)
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            mask = (offs < V) & (offs != label)
            z = tl.load(logits_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
            max_logit = tl.max(z, 0)
            block_anchor = anchor_of(max_logit)
            block_sum = or_nan(tl.sum(exp_anchored(z, block_anchor), 0), max_logit)
            anchor, sum_exp = merge(anchor, sum_exp, block_anchor, block_sum)
        # The log-prob of a label outside the vocabulary is NaN.
        inside = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
        logp = logp_of(target, anchor, sum_exp)
    tl.store(logp_ptr + row, logp)
    tl.store(anchor_ptr + row, anchor)
    tl.store(sum_exp_ptr + row, sum_exp)


def logits_logprob(logits: Tensor, labels: Tensor, ignore_index: int, reuse_logits: bool) -> tuple[Tensor, ...]:
    """logp, anchor and sum_exp [N]; 0 where ignored. `reuse_logits` only matters to backward."""
    logits, labels = _dense_rows(logits), labels.contiguous()
    rows, vocab = logits.shape
    logp, anchor, sum_exp = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        block = min(FORWARD_BLOCK, triton.next_power_of_2(vocab))
        _forward_kernel[(rows,)](
            logits, labels, logp, anchor, sum_exp, vocab, logits.stride(0), ignore_index, BLOCK_V=block,
            num_warps=NUM_WARPS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return logp, anchor, sum_exp


@triton.jit
def _backward_kernel(
    logits_ptr, out_ptr, labels_ptr, anchor_ptr, exp_factor_ptr, grad_target_ptr, V, stride_n, stride_v, stride_out_n,
    stride_out_v, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out = grad_target at the label, exp_factor * u elsewhere."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    exp_factor, grad_target = tl.load(exp_factor_ptr + row), tl.load(grad_target_ptr + row)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs < V
    # A row with zero gradient reads nothing and writes zeros.
    end = tl.where((exp_factor != 0) | (grad_target != 0), V, 0)
    logits_ptr += row * stride_n + offs.to(tl.int64) * stride_v
    z = tl.load(logits_ptr, mask=offs < end, other=float("-inf")).to(tl.float32)
    gradient = tl.where(exp_factor == 0, 0.0, exp_factor * exp_anchored(z, tl.load(anchor_ptr + row)))
    gradient = tl.where(offs == label, grad_target, gradient)  # replaces the target's exponential: it may overflow
    out_ptr += row * stride_out_n + offs.to(tl.int64) * stride_out_v
    tl.store(out_ptr, rounded(gradient, out_ptr.dtype.element_ty), mask=mask)


def logits_logprob_backward(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, anchor: Tensor, sum_exp: Tensor, ignore_index: int
) -> Tensor:
    """The gradient of the logits, in new memory."""
    out = torch.empty_like(logits)
    _write_gradient(grad_logp, logits, labels, logp, anchor, sum_exp, ignore_index, out)
    return out


def logits_logprob_backward_(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, anchor: Tensor, sum_exp: Tensor, ignore_index: int
) -> None:
    """The same, written over the logits: the thread that reads an entry is the one that overwrites it.

    So no two entries may share memory, which the op checks.
    """
    _write_gradient(grad_logp, logits, labels, logp, anchor, sum_exp, ignore_index, logits)


def _write_gradient(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, anchor: Tensor, sum_exp: Tensor, ignore_index: int,
    out: Tensor,
) -> None:  # fmt: skip
    rows, vocab = logits.shape
    if rows == 0:
        return
    grad_target, exp_factor = logit_gradient(grad_logp, labels, logp, sum_exp, ignore_index)
    block = min(BACKWARD_BLOCK, triton.next_power_of_2(vocab))
    _backward_kernel[rows, triton.cdiv(vocab, block)](
        logits, out, labels.contiguous(), anchor, exp_factor, grad_target, vocab, *logits.stride(), *out.stride(),
        BLOCK_V=block, num_warps=NUM_WARPS, **COMPILER_OPTIONS,
    )  # fmt: skip


def _dense_rows(logits: Tensor) -> Tensor:
    """The logits with contiguous rows, which may be any distance apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
