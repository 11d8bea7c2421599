"""Merges the partial sums of vocabulary tiles, and rescales tiles of exponentials to a common anchor.

    anchor, sum_exp [N] = their own values merged with the partial sums [T, N]         (anchors: see primitives.py)
    matrix [N, C] *= 2^(from - to)

Bytes read to merge: 8 N T. A matrix is read and written only in rows whose anchor changed.
Legend: N tokens, T vocabulary tiles, C columns, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS
from .primitives import NO_ANCHOR, logp_of, merge, rounded

BLOCK_N, BLOCK_T, BLOCK_C = 32, 32, 128
STEPS = 8  # blocks of exponentials per program


@triton.jit
def _merge_kernel(
    anchor_TN_ptr, sum_exp_TN_ptr, target_ptr, labels_ptr, anchor_ptr, sum_exp_ptr, logp_ptr, matrix_ptr, N, D,
    first_tile, end_tile, ignore_index, FINISH: tl.constexpr, HAS_MATRIX: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge tiles [first_tile, end_tile) into anchor, sum_exp [N]. FINISH: also write logp, and 0 where ignored.

    HAS_MATRIX: also rescale the rows of a matrix [N, D] from the old anchor to the new one.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index)
    labeled = mask_n & (labels != ignore_index)
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=NO_ANCHOR)
    sum_exp = tl.load(sum_exp_ptr + offs_n, mask=mask_n, other=0.0)
    for tile in range(first_tile, end_tile, BLOCK_T):
        offs_t = tile + tl.arange(0, BLOCK_T)
        offs = offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
        mask = (offs_t < end_tile)[:, None] & labeled[None, :]
        anchors = tl.load(anchor_TN_ptr + offs, mask=mask, other=NO_ANCHOR)
        sums_exp = tl.load(sum_exp_TN_ptr + offs, mask=mask, other=0.0)
        max_anchor = tl.max(anchors, 0)
        block_sum = tl.sum(sums_exp * tl.exp2(anchors - max_anchor[None, :]), 0)
        anchor, sum_exp = merge(anchor, sum_exp, max_anchor, block_sum)
    if HAS_MATRIX:
        before = tl.load(anchor_ptr + offs_n, mask=mask_n, other=NO_ANCHOR)
        changed = mask_n & (anchor != before)
        if tl.max(changed.to(tl.int32), 0) > 0:
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
                mask = changed[:, None] & (offs_d < D)[None, :]
                values = tl.load(matrix_ptr + offs, mask=mask, other=0.0)
                tl.store(matrix_ptr + offs, values * tl.exp2(before - anchor)[:, None], mask=mask)
    if FINISH:
        target = tl.load(target_ptr + offs_n, mask=labeled, other=0.0)
        logp = tl.where(labeled, logp_of(target, anchor, sum_exp), 0.0)
        tl.store(logp_ptr + offs_n, logp, mask=mask_n)
        anchor = tl.where(labeled, anchor, 0.0)
        sum_exp = tl.where(labeled, sum_exp, 0.0)
    tl.store(anchor_ptr + offs_n, anchor, mask=mask_n)
    tl.store(sum_exp_ptr + offs_n, sum_exp, mask=mask_n)


@triton.jit
def block_position(step, N, C, first_tile, BLOCK_TILE: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """Tokens, their mask, columns and vocabulary tile of a block. The exponentials [N, C] begin at first_tile.

    A program goes through STEPS blocks. Most of them need no change, so starting programs would take most of the time.
    """
    block_c = tl.program_id(1) * STEPS + step
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < tl.where(block_c * BLOCK_C < C, N, 0)
    offs_c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs_n, mask_n, offs_c, (first_tile + block_c * BLOCK_C // BLOCK_TILE).to(tl.int64)


@triton.jit
def _rescale_kernel(
    matrix_ptr, from_ptr, to_ptr, N, C, first_tile, BLOCK_TILE: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """matrix [N, C] *= 2^(from - to). `from` is per token and tile of BLOCK_TILE columns. Skips equal anchors."""
    for step in range(STEPS):
        offs_n, mask_n, offs_c, tile = block_position(step, N, C, first_tile, BLOCK_TILE, STEPS, BLOCK_N, BLOCK_C)
        from_anchor = tl.load(from_ptr + tile * N + offs_n, mask=mask_n, other=0.0)
        to_anchor = tl.load(to_ptr + offs_n, mask=mask_n, other=0.0)
        changed = mask_n & (from_anchor != to_anchor)
        if tl.max(changed.to(tl.int32), 0) > 0:
            offs = offs_n.to(tl.int64)[:, None] * C + offs_c[None, :]
            mask = changed[:, None] & (offs_c < C)[None, :]
            values = tl.load(matrix_ptr + offs, mask=mask, other=0.0)
            factor = tl.exp2(from_anchor - to_anchor)[:, None]
            tl.store(matrix_ptr + offs, rounded(values.to(tl.float32) * factor, values.dtype), mask=mask)


def empty_sums(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """anchor and sum_exp [N] of an empty sum."""
    anchor_N = torch.full((rows,), NO_ANCHOR.value, dtype=torch.float32, device=device)
    return anchor_N, torch.zeros_like(anchor_N)


def merge_tiles(
    anchor_TN: Tensor, sum_exp_TN: Tensor, tiles: range, anchor_N: Tensor, sum_exp_N: Tensor, labels: Tensor,
    ignore_index: int, target_N: Tensor | None = None, matrix_ND: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Merge the sums of `tiles` into anchor, sum_exp [N] in place. Return logp [N]; it is set only with `target_N`.

    The rows of `matrix_ND` (float32, contiguous) are rescaled from the old anchors to the new ones.
    """
    rows = anchor_N.shape[0]
    logp_N = torch.empty_like(anchor_N)
    if rows:
        _merge_kernel[(triton.cdiv(rows, BLOCK_N),)](
            anchor_TN, sum_exp_TN, anchor_N if target_N is None else target_N, labels, anchor_N, sum_exp_N, logp_N,
            logp_N if matrix_ND is None else matrix_ND, rows, 0 if matrix_ND is None else matrix_ND.shape[1],
            tiles.start, tiles.stop, ignore_index, FINISH=target_N is not None, HAS_MATRIX=matrix_ND is not None,
            BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_C, **COMPILER_OPTIONS,
        )  # fmt: skip
    return logp_N


def blocks(rows: int, columns: int, tile_columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid and the constants of a kernel over exponentials [N, C] in tiles of `tile_columns` columns."""
    block_c = min(BLOCK_C, tile_columns)  # so that a block lies in one tile
    constants = {"BLOCK_TILE": tile_columns, "STEPS": STEPS, "BLOCK_N": BLOCK_N, "BLOCK_C": block_c}
    return (triton.cdiv(rows, BLOCK_N), triton.cdiv(columns, block_c * STEPS)), constants


def rescale(matrix_NC: Tensor, from_TN: Tensor, to_N: Tensor, tiles: range, tile_columns: int) -> None:
    """Multiply a contiguous matrix [N, C] by 2^(from - to) in place, which is exact.

    `from_TN` [T, N] holds the anchors of tiles of `tile_columns` columns. The matrix starts at tile `tiles.start`.
    """
    rows, columns = matrix_NC.shape
    if rows and columns:
        grid, constants = blocks(rows, columns, tile_columns)
        _rescale_kernel[grid](matrix_NC, from_TN, to_N, rows, columns, tiles.start, **constants, **COMPILER_OPTIONS)
