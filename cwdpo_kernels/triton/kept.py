"""Exponentials that forward of a trainable head keeps, so that backward needs no kernel between them and its GEMMs.

With u_v = exp(z_v - anchor ln 2) at the anchor of the whole vocabulary, sum_exp = sum u_v over the competitors v != y,
and per token

    U_v = u_v for v != y,   U_y = -sum_exp,   all of them 0 if the token is ignored or its log-prob is NaN,
    factor = grad_logp * (1 - p_y) * scale / U_y

the gradient of unscaled logits is factor * U, so that of a chunk of columns

    grad_hidden += factor * (U @ weight),   grad_weight = U.T @ (factor * hidden)

U and factor * hidden are rounded to the dtype of the inputs. `factor` divides by the rounded U_y. That cancels its
rounding error in the label's entry of the gradient, which is the largest.

Anchors of tiles never fall from one chunk to the next, and in bfloat16 most of them stay the same (see primitives.py).
At the end all tiles are rescaled to the last anchor. That multiplies by powers of two, so nothing is rounded twice, and
most tiles need no change.

Bytes moved: the tiles once, and twice more in rows of tiles whose anchor was not the last one.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles of BLOCK_V, C vocabulary columns of a chunk of tiles.
"""

from __future__ import annotations

import functools
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import WORKSPACE_BYTES
from .combine import block_position, blocks, empty_sums, merge_tiles
from .configs import COMPILER_OPTIONS
from .primitives import rounded
from .sweep import Sweep

ALIGNMENT = 16  # bytes, for vector loads
MANY_WAVES = 16  # a sweep of at least so many waves of programs may compute the first one twice: a cost of 1/16
MIN_COLUMNS = 4096  # enough for GEMMs to run at the full rate


@triton.jit
def _finish_kernel(
    tile_ptr, anchor_TN_ptr, anchor_ptr, sum_exp_ptr, logp_ptr, labels_ptr, N, C, first_tile, first_column,
    ignore_index, BLOCK_TILE: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rescale exponentials [N, C] to the last anchor; write the entries of labels and of tokens without gradient."""
    for step in range(STEPS):
        offs_n, mask_n, offs_c, tile = block_position(step, N, C, first_tile, BLOCK_TILE, STEPS, BLOCK_N, BLOCK_C)
        tile_anchor = tl.load(anchor_TN_ptr + tile * N + offs_n, mask=mask_n, other=0.0)
        anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
        logp = tl.load(logp_ptr + offs_n, mask=mask_n, other=0.0)
        labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index)
        ignored = (labels == ignore_index) | (logp != logp)
        is_label = (labels - first_column)[:, None] == offs_c[None, :]
        changed = ((ignored | (tile_anchor != anchor))[:, None] | is_label) & mask_n[:, None]
        if tl.max(tl.max(changed.to(tl.int32), 1), 0) > 0:
            sum_exp = tl.load(sum_exp_ptr + offs_n, mask=mask_n, other=0.0)
            offs = offs_n.to(tl.int64)[:, None] * C + offs_c[None, :]
            mask = changed & (offs_c < C)[None, :]
            u = tl.load(tile_ptr + offs, mask=mask, other=0.0)
            values = tl.where(is_label, -sum_exp[:, None], u.to(tl.float32) * tl.exp2(tile_anchor - anchor)[:, None])
            values = tl.where(ignored[:, None], 0.0, values)
            tl.store(tile_ptr + offs, rounded(values, u.dtype), mask=mask)


class KeptChunks:
    """The vocabulary in chunks of tiles, and the memory of those whose exponentials are kept.

    The first chunks of the vocabulary are kept, in this order at the end of `storage`: opaque bytes, or the memory of
    grad_weight [V, D]. Backward overwrites the latter from the start, so a chunk must lie after the gradients of all
    chunks before it. With a soft cap nothing is kept, because the slopes would be needed too.

    chunks: ranges of vocabulary tiles. views: first tile of a kept chunk -> its entries [N, C].
    """

    def __init__(
        self, storage: Tensor, hidden: Tensor, vocab: int, block_v: int, softcap: float | None, workspace_bytes: int
    ) -> None:
        self.rows, self.vocab, self.block_v = hidden.shape[0], vocab, block_v
        self.bytes = storage.view(-1).view(torch.uint8)
        end = self.bytes.numel() // ALIGNMENT * ALIGNMENT if softcap is None else 0
        self.gradient_row_bytes = storage.shape[1] * storage.element_size() if storage.dim() == 2 else 0
        column_bytes = self.rows * hidden.element_size()
        size, count = plan(column_bytes, vocab, block_v, end, self.gradient_row_bytes, workspace_bytes)
        tiles_v = triton.cdiv(vocab, block_v) if self.rows else 0
        first_other = min(count * size, tiles_v)
        others = triton.cdiv(tiles_v - first_other, tiles_per_chunk(column_bytes, block_v, workspace_bytes))
        other_size = triton.cdiv(tiles_v - first_other, max(others, 1))
        starts = [*range(0, first_other, size), *range(first_other, tiles_v, max(other_size, 1))]
        self.chunks = [range(*pair) for pair in itertools.pairwise([*starts, tiles_v])]

        sizes = {tiles.start: self.rows * self.width(tiles) * hidden.element_size() for tiles in self.chunks[:count]}
        start = end - _aligned(sum(sizes.values()))
        self.views: dict[int, Tensor] = {}
        self._starts: dict[int, int] = {}
        self._unused = [(0, start), (start + sum(sizes.values()), self.bytes.numel())]
        for (first, size_bytes), tiles in zip(sizes.items(), self.chunks, strict=False):
            entries = self.bytes[start : start + size_bytes].view(hidden.dtype)
            self.views[first], self._starts[first] = entries.view(self.rows, self.width(tiles)), start
            start += size_bytes

    def width(self, tiles: range) -> int:
        """The number of vocabulary columns in `tiles`."""
        return min(tiles.stop * self.block_v, self.vocab) - tiles.start * self.block_v

    def outlives_its_gradient(self, tiles: range) -> bool:
        """Whether a kept chunk can be read while the gradient of its columns is written."""
        return self._starts[tiles.start] >= tiles.stop * self.block_v * self.gradient_row_bytes

    def zero_unused(self) -> None:
        """Zero all bytes that hold no kept entry."""
        for start, stop in self._unused:
            if start < stop:
                self.bytes[start:stop] = 0

    def fill(self, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
        """Run the whole sweep and fill the kept chunks. Returns logp, anchor, sum_exp [N]."""
        kept = [tiles for tiles in self.chunks if tiles.start in self.views]
        rest = range(kept[-1].stop if kept else 0, sweep.tiles_v)
        anchor_N, sum_exp_N = empty_sums(sweep.rows, sweep.hidden.device)
        first, wave = rest, sweep.wave()
        if not rest and len(wave) * MANY_WAVES <= sweep.tiles_v:
            first = wave  # computed twice, so that the tiles of the first chunk share anchors
        sweep.run(first)
        least_anchor_N = sweep.anchor_TN[first.start : first.stop].amax(0) if first else anchor_N
        for tiles in kept:
            sweep.run(tiles, min_anchor=least_anchor_N, out=self.views[tiles.start])
            least_anchor_N = torch.maximum(least_anchor_N, sweep.anchor_TN[tiles.start : tiles.stop].amax(0))
        logp_N = merge_tiles(
            sweep.anchor_TN, sweep.sum_exp_TN, range(sweep.tiles_v), anchor_N, sum_exp_N, sweep.labels,
            sweep.ignore_index, sweep.target_N,
        )  # fmt: skip
        for tiles in kept:
            width = self.width(tiles)
            grid, constants = blocks(sweep.rows, width, self.block_v)
            _finish_kernel[grid](
                self.views[tiles.start], sweep.anchor_TN, anchor_N, sum_exp_N, logp_N, sweep.labels, sweep.rows, width,
                tiles.start, tiles.start * self.block_v, sweep.ignore_index, **constants, **COMPILER_OPTIONS,
            )  # fmt: skip
        return logp_N, anchor_N, sum_exp_N


def kept_factor(exp_factor: Tensor, sum_exp: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor` [N]: exp_factor = -grad_logp * (1 - p_y) * scale / sum_exp, for `sum_exp` rounded to `dtype`."""
    return torch.where(exp_factor == 0, 0.0, exp_factor * (sum_exp / sum_exp.to(dtype)))


def _aligned(size: int) -> int:
    return triton.cdiv(size, ALIGNMENT) * ALIGNMENT


def tiles_per_chunk(column_bytes: int, block_v: int, workspace_bytes: int) -> int:
    """How many vocabulary tiles of all rows fit the workspace, at least one; 0 selects the default workspace."""
    return max((workspace_bytes or WORKSPACE_BYTES) // max(column_bytes * block_v, 1), 1)


@functools.lru_cache(1024)
def plan(
    column_bytes: int, vocab: int, block_v: int, storage_bytes: int, gradient_row_bytes: int, workspace_bytes: int
) -> tuple[int, int]:
    """The number of tiles in a kept chunk, and how many such chunks are kept.

    Of the sizes that fit the workspace and have at least MIN_COLUMNS columns, the chunk has the one that keeps the most
    columns; of several, the largest. `column_bytes`: the bytes of N entries. `storage_bytes`: 0 keeps nothing.
    """
    most, tiles_v = tiles_per_chunk(column_bytes, block_v, workspace_bytes), triton.cdiv(vocab, block_v)
    most = min(most, tiles_v)
    if column_bytes == 0 or storage_bytes == 0:
        return most, 0

    def kept(size: int) -> int:
        """How many chunks of this size fit."""
        chunk, gradient = size * block_v * column_bytes, size * block_v * gradient_row_bytes
        chunks = triton.cdiv(tiles_v, size)
        last = _aligned((vocab - (chunks - 1) * size * block_v) * column_bytes)
        # Together they fit into the memory, and the last one lies after the gradients of all others.
        if (chunks - 1) * max(chunk, gradient) + last <= storage_bytes:
            return chunks
        return min(storage_bytes // chunk, chunks - 1)  # then the last one lies after those gradients in any case

    sizes = range(min(triton.cdiv(MIN_COLUMNS, block_v), most), most + 1)
    size = max(sizes, key=lambda size: (min(kept(size) * size, tiles_v), size))
    return size, kept(size)
