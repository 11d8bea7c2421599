"""logits_logprob on a GPU: the algebra of portable/logits_logprob.py, one program a row of logits.

Forward reads the logits once; backward reads them once and writes the gradient once, on request over the logits
themselves. Bytes moved, b a logit's: N V b forward, 2 N V b backward; a row without a label is not read, one without
an upstream gradient is written only. Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .primitives import NO_ANCHOR, anchor_of, exp_anchored, join, logp_of, rounded

FORWARD_BLOCK, BACKWARD_BLOCK, NUM_WARPS = 8192, 4096, 8


@triton.jit
def _forward_kernel(
    logits_ptr, labels_ptr, logp_ptr, anchor_ptr, total_ptr, V, stride_n, ignore_index, BLOCK_V: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    zero = tl.full((), 0.0, tl.float32)
    logp, anchor, total = zero, zero, zero
    if label != ignore_index:
        logits_ptr += row * stride_n
        anchor = tl.full((), NO_ANCHOR, tl.float32)
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            mask = (offs < V) & (offs != label)
            z = tl.load(logits_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
            block_anchor = anchor_of(tl.max(z, 0))
            anchor, total = join(anchor, total, block_anchor, tl.sum(exp_anchored(z, block_anchor), 0))
        # A label outside the vocabulary gives NaN, not garbage.
        inside = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
        logp = logp_of(target, anchor, total)
    tl.store(logp_ptr + row, logp)
    tl.store(anchor_ptr + row, anchor)
    tl.store(total_ptr + row, total)


@triton.jit
def _backward_kernel(
    logits_ptr, out_ptr, labels_ptr, anchor_ptr, push_ptr, pull_ptr, V, stride_n, stride_out, BLOCK_V: tl.constexpr
):
    """out = push * exp(z - anchor ln 2), or pull at the label; zeros where neither pulls nor pushes."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    push, pull = tl.load(push_ptr + row), tl.load(pull_ptr + row)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs < V
    end = tl.where(tl.maximum(tl.abs(push), tl.abs(pull)) > 0, V, 0)  # of what is read
    z = tl.load(logits_ptr + row * stride_n + offs, mask=offs < end, other=float("-inf")).to(tl.float32)
    gradient = push * exp_anchored(z, tl.load(anchor_ptr + row))
    gradient = tl.where(offs == label, pull, gradient)  # over the label's own exponential: it may have overflowed
    tl.store(out_ptr + row * stride_out + offs, rounded(gradient, out_ptr.dtype.element_ty), mask=mask)


def logits_logprob(logits: Tensor, labels: Tensor, ignore_index: int, reuse_logits: bool) -> tuple[Tensor, ...]:
    """logp, peak (the anchor) and total [N]; 0 where ignored."""
    logits, labels = _rows_dense(logits), labels.contiguous()
    rows, vocab = logits.shape
    logp, anchor, total = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        block = min(FORWARD_BLOCK, triton.next_power_of_2(vocab))
        _forward_kernel[(rows,)](
            logits, labels, logp, anchor, total, vocab, logits.stride(0), ignore_index, BLOCK_V=block,
            num_warps=NUM_WARPS, **COMPILER_OPTIONS,
        )  # fmt: skip
    return logp, anchor, total


def logits_logprob_backward(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, peak: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    """d logp / d z_v = (1 - p_y) * (1 if v == y else -q_v), in new memory."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(grad_logp, _rows_dense(logits), labels, logp, peak, total, ignore_index, out)
    return out


def logits_logprob_backward_(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, peak: Tensor, total: Tensor, ignore_index: int
) -> None:
    """The same, over the logits' own memory: each entry is read before it is overwritten, by the same thread."""
    _write_gradient(grad_logp, logits, labels, logp, peak, total, ignore_index, logits)


def _write_gradient(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, peak: Tensor, total: Tensor, ignore_index: int,
    out: Tensor,
) -> None:  # fmt: skip
    rows, vocab = logits.shape
    if rows == 0:
        return
    pull = torch.where(labels != ignore_index, grad_logp * -torch.expm1(logp), 0.0)  # 1 - p_y = -expm1(logp)
    push = torch.where(total > 0, -pull / total, 0.0)  # without any competitor (V = 1) total is 0
    block = min(BACKWARD_BLOCK, triton.next_power_of_2(vocab))
    _backward_kernel[rows, triton.cdiv(vocab, block)](
        logits, out, labels.contiguous(), peak, push, pull, vocab, logits.stride(0), out.stride(0), BLOCK_V=block,
        num_warps=NUM_WARPS, **COMPILER_OPTIONS,
    )  # fmt: skip


def _rows_dense(logits: Tensor) -> Tensor:
    """Rows may lie anywhere, their entries side by side."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
