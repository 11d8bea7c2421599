"""Device functions for packed sequences: sums over the tokens of a sequence, and broadcasts to its tokens.

Sequence s holds tokens [cu_seqlens[s], cu_seqlens[s + 1]). Without labels every token counts; with a given `count`,
each "token" is already the sum of a sequence.

Offsets on a GPU cannot be checked before a launch, because that would sync it. So every program checks all of them
(`offsets_fit`). If they are wrong, no program uses them: sequence 0 then has all tokens and the others none, every
float result is NaN, and every count is 1, because a loss leaves out answers of length 0. A device assert would
make the whole process lose its GPU, and does nothing in the interpreter and in release builds of ROCm.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_TOKENS = 1024


@triton.jit
def offsets_fit(cu_seqlens_ptr, S, N, BLOCK: tl.constexpr):
    """Whether the offsets [S + 1] rise from 0 to N."""
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < S
        begin = tl.load(cu_seqlens_ptr + offs, mask=mask, other=0)
        end = tl.load(cu_seqlens_ptr + offs + 1, mask=mask, other=0)
        wrong |= (begin > end).to(tl.int32)
    first, last = tl.load(cu_seqlens_ptr), tl.load(cu_seqlens_ptr + S)
    return (tl.max(wrong, 0) == 0) & (first == 0) & (last == N)


@triton.jit
def bounds(cu_seqlens_ptr, sequence, N, fit):
    """[begin, end) of a sequence; if the offsets do not `fit`, all tokens for sequence 0 and none for the others."""
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    return tl.where(fit, begin, 0), tl.where(fit, end, tl.where(sequence == 0, N, 0))


@triton.jit
def segment_sum(
    logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_out_ptr, sequence, N, fit,
    ignore_index, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write sum_logp (nats), mean (0 if empty) and count of one sequence. Sums in float64, in a fixed order."""
    begin, end = bounds(cu_seqlens_ptr, sequence, N, fit)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int64)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        if HAS_LABELS:
            mask &= tl.load(labels_ptr + offs, mask=mask, other=ignore_index) != ignore_index
        sums += tl.load(logp_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        counts += mask.to(tl.int64)
    sum_logp = tl.where(fit, tl.sum(sums, 0).to(tl.float32), float("nan"))
    count = tl.where(fit, tl.load(count_ptr + sequence) if HAS_COUNT else tl.sum(counts, 0), 1)
    tl.store(sum_logp_ptr + sequence, sum_logp)
    tl.store(mean_ptr + sequence, sum_logp / tl.maximum(count, 1).to(tl.float32))
    tl.store(count_out_ptr + sequence, count)


@triton.jit
def broadcast(
    value, out_ptr, labels_ptr, cu_seqlens_ptr, sequence, N, fit, ignore_index, HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = value at the labeled tokens of a sequence, 0 at its other tokens."""
    begin, end = bounds(cu_seqlens_ptr, sequence, N, fit)
    value = tl.where(fit, value, float("nan"))
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
    logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_out_ptr, S, N, fit,
    ignore_index, HAS_LABELS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """segment_sum of every sequence, in one program. The program may load the results afterwards."""
    for sequence in range(S):
        segment_sum(
            logp_ptr, labels_ptr, count_ptr, cu_seqlens_ptr, sum_logp_ptr, mean_ptr, count_out_ptr, sequence, N, fit,
            ignore_index, HAS_LABELS, HAS_COUNT, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()  # other threads load what one thread stored


@triton.jit
def broadcast_all(
    values_ptr, out_ptr, labels_ptr, cu_seqlens_ptr, S, N, fit, ignore_index, HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """broadcast of every sequence, in the program that stored the values."""
    tl.debug_barrier()  # other threads load what one thread stored
    for sequence in range(S):
        value = tl.load(values_ptr + sequence)
        broadcast(value, out_ptr, labels_ptr, cu_seqlens_ptr, sequence, N, fit, ignore_index, HAS_LABELS, BLOCK)
