"""One sweep over vocabulary tiles: what the labels' competitors add up to, and on request their exponentials.

Per token and tile, with z the logits, y the label (left out of the sum), anchors as in primitives.py:

    anchor, total = sum_{v != y} exp(z_v - anchor ln 2)          [T, N] each, T tiles
    target = z_y                                                 [N], written by the tile that holds the label
    tile   = exp(z_v - anchor ln 2) * slope                      [N, columns] in the inputs' dtype   (WRITE_TILE)
    peak = max z_v,  moment = sum u log2(u),  u = exp(z_v - anchor ln 2)      [T, N] each            (STATISTICS)

2 N D V floating-point operations; moves the operands, 8 N T bytes and, on request, the tiles: never logits.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles of BLOCK_V, C columns of a tile of exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS, TileConfig, grid, operands, precision, tile_config
from .primitives import (
    NO_ANCHOR,
    anchor_of,
    log2_anchored,
    logits_tile,
    rounded,
    slope_of,
    tile_position,
)


@triton.jit
def _sweep_kernel(
    hidden, weight, bias_ptr, labels_ptr, running_ptr, anchor_ptr, total_ptr, target_ptr, tile_ptr, peak_ptr,
    moment_ptr, N, V, D, first_tile_v, end_tile_v, tile_columns,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, scale, softcap, ignore_index,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_RUNNING: tl.constexpr, WRITE_TILE: tl.constexpr,
    STATISTICS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_v = end_tile_v - first_tile_v
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        pid_n, pid_v = tile_position(tile, tiles_n, tiles_v, GROUP_N)
        row = pid_n * BLOCK_N
        tile_v = first_tile_v + pid_v
        col = tile_v * BLOCK_V
        offs_n = row + tl.arange(0, BLOCK_N)
        offs_v = col + tl.arange(0, BLOCK_V)
        mask_n = offs_n < N
        labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index)
        labelled = labels != ignore_index
        # A block without a label costs no product: a loop of zero steps, and its results are never read.
        depth = tl.where(tl.max(labelled.to(tl.int32), 0) > 0, D, 0)
        z = logits_tile(
            hidden, weight, bias_ptr, row, col, N, V, depth, stride_hidden_n, stride_hidden_d, stride_weight_v,
            stride_weight_d, scale, softcap, HAS_BIAS, HAS_SOFTCAP, PRECISION, DESCRIPTORS, BLOCK_N, BLOCK_V,
            BLOCK_D,
        )  # fmt: skip

        labels = labels.to(tl.int32)  # half the registers of an int64 comparison
        is_label = offs_v[None, :] == labels[:, None]
        holds_label = labelled & (labels >= col) & (labels < tl.minimum(col + BLOCK_V, V))
        tl.store(target_ptr + offs_n, tl.sum(tl.where(is_label, z, 0.0), 1), mask=holds_label)
        competitor = tl.where(is_label | (offs_v >= V)[None, :], float("-inf"), z)

        peak = tl.max(competitor, 1)
        anchor = anchor_of(peak)
        if HAS_RUNNING:
            anchor = tl.maximum(anchor, tl.load(running_ptr + offs_n, mask=mask_n, other=NO_ANCHOR))
        exponent = log2_anchored(competitor, anchor[:, None])
        u = tl.exp2(exponent)
        offs_partial = tile_v.to(tl.int64) * N + offs_n
        tl.store(anchor_ptr + offs_partial, anchor, mask=mask_n)
        tl.store(total_ptr + offs_partial, tl.sum(u, 1), mask=mask_n)
        if STATISTICS:
            tl.store(peak_ptr + offs_partial, peak, mask=mask_n)
            tl.store(moment_ptr + offs_partial, tl.sum(tl.where(u > 0, u * exponent, 0.0), 1), mask=mask_n)
        if WRITE_TILE:
            if HAS_SOFTCAP:
                u *= slope_of(z, softcap)
            offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
            offs_tile = offs_n.to(tl.int64)[:, None] * tile_columns + offs_c[None, :]
            mask_tile = mask_n[:, None] & (offs_c < tile_columns)[None, :]
            tl.store(tile_ptr + offs_tile, rounded(u, tile_ptr.dtype.element_ty), mask=mask_tile)


@dataclass
class Sweep:
    """A head and its tokens, laid out for sweeps; the partial results of every vocabulary tile."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float
    softcap: float | None
    ignore_index: int
    statistics: bool = False

    def __post_init__(self) -> None:
        narrower = 2 if self.statistics else 1
        self.config: TileConfig = tile_config(self.hidden, self.softcap, narrower=narrower)
        self.rows, self.vocab = self.hidden.shape[0], self.weight.shape[0]
        self.tiles_v = triton.cdiv(self.vocab, self.config.block_v)

        def partial() -> Tensor:
            return self.hidden.new_empty(self.tiles_v, self.rows, dtype=torch.float32)

        self.anchor_TN, self.total_TN = partial(), partial()
        self.peak_TN, self.moment_TN = (partial(), partial()) if self.statistics else (self.total_TN, self.total_TN)
        # A label outside the vocabulary is in no tile: its log-probability comes out as NaN, not as garbage.
        self.target_N = torch.full((self.rows,), torch.nan, dtype=torch.float32, device=self.hidden.device)

    def tile_arguments(self) -> dict:
        """What every kernel that forms this head's logits takes, launch options included."""
        return tile_arguments(self.hidden, self.weight, self.bias, self.scale, self.softcap, self.config)

    def run(self, tiles: range, running: Tensor | None = None, out: Tensor | None = None) -> None:
        """Sweep over the vocabulary tiles; `out` [N, C] takes their exponentials, `running` [N] is the least anchor."""
        if self.rows == 0 or len(tiles) == 0:
            return
        total = triton.cdiv(self.rows, self.config.block_n) * len(tiles)
        _sweep_kernel[grid(self.config, total, self.hidden.device)](
            **self.tile_arguments(), labels_ptr=self.labels,
            running_ptr=self.target_N if running is None else running, anchor_ptr=self.anchor_TN,
            total_ptr=self.total_TN, target_ptr=self.target_N, tile_ptr=self.hidden if out is None else out,
            peak_ptr=self.peak_TN, moment_ptr=self.moment_TN, N=self.rows, V=self.vocab, D=self.hidden.shape[1],
            first_tile_v=tiles.start, end_tile_v=tiles.stop, tile_columns=0 if out is None else out.shape[1],
            ignore_index=self.ignore_index, HAS_RUNNING=running is not None, WRITE_TILE=out is not None,
            STATISTICS=self.statistics, **COMPILER_OPTIONS,
        )  # fmt: skip


def tile_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, config: TileConfig
) -> dict:
    matrices, descriptors = operands(hidden, weight, config.block_n, config.block_v, config.block_d, config.descriptors)
    return {
        **matrices, "bias_ptr": weight if bias is None else bias.contiguous(), "scale": scale,
        "softcap": 1.0 if softcap is None else softcap, "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None, "PRECISION": precision(), "DESCRIPTORS": descriptors,
        "FLATTEN": config.persistent, "GROUP_N": config.group_n, "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v, "BLOCK_D": config.block_d, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
