"""Sums over the tokens of a packed sequence, and a sequence's value back to its tokens: shared by the losses."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_TOKENS = 1024


@triton.jit
def segment_sum(
    logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, total_out_ptr, mean_out_ptr, count_out_ptr, sequence,
    ignore_index, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write total (nats), mean (0 if empty) and count of one sequence. Sums in float64, in a fixed order."""
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int64)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        if HAS_LABELS:
            mask &= tl.load(labels_ptr + offs, mask=mask, other=ignore_index) != ignore_index
        sums += tl.load(logp_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        counts += mask.to(tl.int64)
    total = tl.sum(sums, 0).to(tl.float32)
    count = tl.load(count_ptr + sequence) if HAS_COUNT else tl.sum(counts, 0)
    tl.store(total_out_ptr + sequence, total)
    tl.store(mean_out_ptr + sequence, total / tl.maximum(count, 1).to(tl.float32))
    tl.store(count_out_ptr + sequence, count)


@triton.jit
def spread(
    value, out_ptr, labels_ptr, cu_seqlens_ptr, sequence, ignore_index, HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = value at the sequence's labelled tokens, 0 at its others."""
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        values = tl.zeros((BLOCK,), tl.float32) + value
        if HAS_LABELS:
            labels = tl.load(labels_ptr + offs, mask=mask, other=ignore_index)
            values = tl.where(labels != ignore_index, values, 0.0)
        tl.store(out_ptr + offs, values, mask=mask)


@triton.jit
def all_segment_sums(
    logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, total_out_ptr, mean_out_ptr, count_out_ptr, sequences,
    ignore_index, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """segment_sum of every sequence by one program, which may load the results afterwards."""
    for sequence in range(sequences):
        segment_sum(
            logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, total_out_ptr, mean_out_ptr, count_out_ptr, sequence,
            ignore_index, HAS_LABELS, HAS_COUNT, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()  # what one thread stored, others will load


@triton.jit
def spread_all(
    values_ptr, out_ptr, labels_ptr, cu_seqlens_ptr, sequences, ignore_index, HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """spread every sequence's value by the one program that stored them."""
    tl.debug_barrier()  # what one thread stored, others load now
    for sequence in range(sequences):
        value = tl.load(values_ptr + sequence)
        spread(value, out_ptr, labels_ptr, cu_seqlens_ptr, sequence, ignore_index, HAS_LABELS, BLOCK)
