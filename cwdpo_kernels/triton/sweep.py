"""One sweep over the vocabulary: partial softmax sums of every tile and, optionally, the tile's exponentials.

For a token with label y and logits z, the competitors are all v != y. With u_v = exp(z_v - anchor ln 2) (anchors: see
primitives.py) and all sums and maxima over the competitors of one tile:

    anchor, sum_exp = sum u_v                              [T, N] each
    target = z_y                                           [N], written by the tile that holds the label
    tile = u_v * slope_v                                   [N, C] in the dtype of the inputs      (WRITE_TILE)
    statistics = max z_v, sum u_v log2(u_v), sum u_v^2, and the sum of all z_v, label included
                                                           [T, 4, N]                              (STATISTICS)

2 N D V floating-point operations. Bytes moved: the operands, 8 N T (24 N T with STATISTICS) and, with WRITE_TILE, the
tiles, but never logits.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles of BLOCK_V, C vocabulary columns of a tile of exponentials.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS, TileConfig, grid, operands, precision, tile_config, wave
from .primitives import (
    HEADROOM,
    INTERPRETED,
    NEGLIGIBLE,
    NO_ANCHOR,
    anchor_of,
    log2_anchored,
    logits_tile,
    or_nan,
    rounded,
    slope_of,
    tile_position,
)


@triton.jit
def _is_label(z, offs_n, offs_v, labels, holds_label, target_ptr):
    """Which of the tile's entries are labels. Their logits are written to target."""
    is_label = offs_v[None, :] == labels[:, None]
    tl.store(target_ptr + offs_n, tl.sum(tl.where(is_label, z, 0.0), 1), mask=holds_label)
    return is_label


@triton.jit
def _competitors(z, offs_n, offs_v, V, labels, holds_label, target_ptr):
    """The tile's logits with -inf for labels and outside the vocabulary."""
    is_label = _is_label(z, offs_n, offs_v, labels, holds_label, target_ptr)
    return tl.where(is_label | (offs_v >= V)[None, :], float("-inf"), z)


@triton.jit
def _add(a, b, x, y):
    return a + x, b + y


@triton.jit
def _sweep_kernel(
    hidden, weight, bias_ptr, labels_ptr, min_anchor_ptr, anchor_ptr, sum_exp_ptr, target_ptr, tile_ptr,
    statistics_ptr, N, V, D, first_tile_v, end_tile_v, tile_columns,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, scale, softcap, ignore_index,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_MIN_ANCHOR: tl.constexpr, WRITE_TILE: tl.constexpr,
    STATISTICS: tl.constexpr, SKIP_IGNORED: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = end_tile_v - first_tile_v
    first = tl.program_id(0)
    if FLATTEN:
        end, step = tiles_n * tiles_v, tl.num_programs(0)
    else:  # one tile per program: as no loop, the compiler keeps nothing in registers for a next tile
        end, step = first + 1, 1
    for tile in tl.range(first, end, step, flatten=FLATTEN):
        pid_n, pid_v = tile_position(tile, tiles_n, tiles_v, GROUP_N)
        row = pid_n * BLOCK_N
        tile_v = first_tile_v + pid_v
        col = tile_v * BLOCK_V
        offs_n = row + tl.arange(0, BLOCK_N)
        offs_v = col + tl.arange(0, BLOCK_V)
        mask_n = offs_n < N
        labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index)
        labelled = labels != ignore_index
        if SKIP_IGNORED:  # a block of ignored tokens has a loop of zero steps. Its results are never read.
            depth = tl.where(tl.max(labelled.to(tl.int32), 0) > 0, D, 0)
        else:
            depth = D
            if FLATTEN:
                tl.assume(D > 0)  # else the loop has a second copy of the epilogue, for products of zero steps
        z = logits_tile(
            hidden, weight, bias_ptr, row, col, N, V, depth, stride_hidden_n, stride_hidden_d, stride_weight_v,
            stride_weight_d, scale, softcap, HAS_BIAS, HAS_SOFTCAP, PRECISION, DESCRIPTORS, BLOCK_N, BLOCK_V,
            BLOCK_D,
        )  # fmt: skip
        if STATISTICS:
            sum_logit = tl.sum(z, 1)  # logits outside the vocabulary are 0

        # An int64 comparison takes twice the registers. A label outside the vocabulary is in no tile.
        labels = tl.where((labels >= 0) & (labels < V), labels, -1).to(tl.int32)
        holds_label = labelled & (labels >= col) & (labels < tl.minimum(col + BLOCK_V, V))
        holds_labels, beyond_vocabulary = tl.max(holds_label.to(tl.int32), 0) > 0, col + BLOCK_V > V
        competitor = z
        if FLATTEN:  # a flattened loop runs the epilogue under a condition; a second condition would spill registers
            competitor = _competitors(z, offs_n, offs_v, V, labels, holds_label, target_ptr)
        elif STATISTICS:  # under one condition, it would spill registers
            if holds_labels:
                is_label = _is_label(z, offs_n, offs_v, labels, holds_label, target_ptr)
                competitor = tl.where(is_label, float("-inf"), z)
            if beyond_vocabulary:
                competitor = tl.where((offs_v >= V)[None, :], float("-inf"), competitor)
        else:
            if holds_labels | beyond_vocabulary:  # true for few tiles
                competitor = _competitors(z, offs_n, offs_v, V, labels, holds_label, target_ptr)

        max_logit = tl.max(competitor, 1)
        anchor = anchor_of(max_logit)
        if HAS_MIN_ANCHOR:
            # Statistics are exact at the tile's own anchor only: at another, the entropy is a small difference.
            bf16: tl.constexpr = tile_ptr.dtype.element_ty == tl.bfloat16
            headroom: tl.constexpr = HEADROOM if bf16 and not STATISTICS else 0
            min_anchor = tl.load(min_anchor_ptr + offs_n, mask=mask_n, other=NO_ANCHOR)
            anchor = tl.where(anchor > min_anchor + headroom, anchor, min_anchor)
        exponent = log2_anchored(competitor, anchor[:, None])
        u = tl.exp2(exponent)
        offs_partial = tile_v.to(tl.int64) * N + offs_n
        tl.store(anchor_ptr + offs_partial, anchor, mask=mask_n)
        if STATISTICS:
            log_term = u * tl.maximum(exponent, -NEGLIGIBLE)
            if INTERPRETED:  # reduces pairs one element at a time, in Python
                sum_exp, sum_log = tl.sum(u, 1), tl.sum(log_term, 1)
            else:
                sum_exp, sum_log = tl.reduce((u, log_term), 1, _add)
        else:
            sum_exp = tl.sum(u, 1)
        tl.store(sum_exp_ptr + offs_partial, or_nan(sum_exp, max_logit), mask=mask_n)
        if STATISTICS:
            statistics = statistics_ptr + tile_v.to(tl.int64) * 4 * N + offs_n
            tl.store(statistics, max_logit, mask=mask_n)
            tl.store(statistics + N, sum_log, mask=mask_n)
            tl.store(statistics + 2 * N, tl.sum(u * u, 1), mask=mask_n)
            tl.store(statistics + 3 * N, sum_logit, mask=mask_n)
        if WRITE_TILE:
            if HAS_SOFTCAP:
                u *= slope_of(z, softcap)
            offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
            offs_tile = offs_n.to(tl.int64)[:, None] * tile_columns + offs_c[None, :]
            mask_tile = mask_n[:, None] & (offs_c < tile_columns)[None, :]
            tl.store(tile_ptr + offs_tile, rounded(u, tile_ptr.dtype.element_ty), mask=mask_tile)


@dataclass
class Sweep:
    """The inputs of a sweep, its launch configuration, and the partial results of every vocabulary tile."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float
    softcap: float | None
    ignore_index: int
    statistics: bool = False
    skip_ignored: bool = True  # False if few blocks of tokens have no label: a fixed number of steps is faster

    def __post_init__(self) -> None:
        self.config: TileConfig = tile_config(self.hidden, self.softcap, statistics=self.statistics)
        self.rows, self.vocab = self.hidden.shape[0], self.weight.shape[0]
        self.tiles_v = triton.cdiv(self.vocab, self.config.block_v)

        def partial(*fields: int) -> Tensor:
            return self.hidden.new_empty(self.tiles_v, *fields, self.rows, dtype=torch.float32)

        self.anchor_TN, self.sum_exp_TN = partial(), partial()
        self.statistics_T4N = partial(4) if self.statistics else None
        # No tile writes the target of a label outside the vocabulary: its log-prob stays NaN.
        self.target_N = torch.full((self.rows,), torch.nan, dtype=torch.float32, device=self.hidden.device)

    @functools.cached_property
    def tile_arguments(self) -> dict:
        """The arguments of any kernel that computes logits of this head, launch options included."""
        return tile_arguments(self.hidden, self.weight, self.bias, self.scale, self.softcap, self.config)

    def wave(self) -> range:
        """The first vocabulary tiles, as many as run at once; an empty range unless the dtype is bfloat16.

        In bfloat16, most later tiles can use the anchors of these, and then need no rescaling.
        """
        tiles = wave(self.config, self.rows, self.hidden.device) if self.hidden.dtype == torch.bfloat16 else 0
        return range(min(tiles, self.tiles_v))

    def run(self, tiles: range, min_anchor: Tensor | None = None, out: Tensor | None = None) -> None:
        """Sweep over `tiles`. Their exponentials go to `out` [N, C].

        Anchors are at least `min_anchor` [N]. For bfloat16 tiles without statistics they are equal to it, unless the
        tile's own anchor is more than HEADROOM above.
        """
        if self.rows == 0 or len(tiles) == 0:
            return
        n_tiles = triton.cdiv(self.rows, self.config.block_n) * len(tiles)
        _sweep_kernel[grid(self.config, n_tiles, self.hidden.device)](
            **self.tile_arguments, labels_ptr=self.labels,
            min_anchor_ptr=self.target_N if min_anchor is None else min_anchor, anchor_ptr=self.anchor_TN,
            sum_exp_ptr=self.sum_exp_TN, target_ptr=self.target_N, tile_ptr=self.hidden if out is None else out,
            statistics_ptr=self.statistics_T4N, N=self.rows, V=self.vocab, D=self.hidden.shape[1],
            first_tile_v=tiles.start, end_tile_v=tiles.stop, tile_columns=0 if out is None else out.shape[1],
            ignore_index=self.ignore_index, HAS_MIN_ANCHOR=min_anchor is not None, WRITE_TILE=out is not None,
            STATISTICS=self.statistics, SKIP_IGNORED=self.skip_ignored, **COMPILER_OPTIONS,
        )  # fmt: skip


def tile_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, config: TileConfig
) -> dict:
    """The arguments of a kernel that computes the logits of a head, in tiles of `config`, launch options included."""
    matrices, descriptors = operands(hidden, weight, config.block_n, config.block_v, config.block_d, config.descriptors)
    return {
        **matrices, "bias_ptr": weight if bias is None else bias.contiguous(),
        "scale": None if scale == 1 else scale,  # as a constant, None costs no multiplication
        "softcap": 1.0 if softcap is None else softcap, "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None, "PRECISION": precision(), "DESCRIPTORS": descriptors,
        "FLATTEN": config.persistent, "GROUP_N": config.group_n, "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v, "BLOCK_D": config.block_d, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
