"""The direction of a frozen head's gradient on a GPU: d logp / d hidden = (1 - p_y) * direction, all in forward.

With u_v = exp(z_v - anchor ln 2) and sums over the competitors v != y of the label,

    direction = scale * (slope_y W_y - sum u_v slope_v W_v / sum_exp)

A sweep (sweep.py) writes u_v slope_v, a chunk of the vocabulary at a time in the dtype of the inputs, and a dense GEMM
accumulates their products with W in float32: 4 N D V floating-point operations and 2 N V tile entries moved.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles of BLOCK_V, C vocabulary columns of a chunk of tiles.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import empty_sums, merge_tiles, rescale
from .configs import COMPILER_OPTIONS
from .gemm import DenseGemm
from .kept import tiles_per_chunk
from .primitives import rounded, slope_of
from .sweep import Sweep

BLOCK_N, BLOCK_D = 16, 128


@triton.jit
def _direction_kernel(
    sum_exp_weight_ptr, weight_ptr, labels_ptr, target_ptr, logp_ptr, sum_exp_ptr, out_ptr, N, V, D, stride_weight_v,
    stride_weight_d, scale, softcap, ignore_index, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale * (slope_y W_y - sum_exp_weight / sum_exp); 0 where ignored, or where logp is NaN.

    If logp is NaN, so is 1 - p_y. Backward then gives 0 for an upstream gradient of 0, and NaN for any other.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < D
    labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=ignore_index).to(tl.int64)
    labelled = (labels != ignore_index) & (labels >= 0) & (labels < V)
    sum_exp = tl.load(sum_exp_ptr + offs_n, mask=mask_n, other=0.0)
    offs_weight = labels[:, None] * stride_weight_v + offs_d.to(tl.int64)[None, :] * stride_weight_d
    mask_weight = labelled[:, None] & mask_d[None, :]
    label_weight = tl.load(weight_ptr + offs_weight, mask=mask_weight, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        label_weight *= slope_of(tl.load(target_ptr + offs_n, mask=labelled, other=0.0), softcap)[:, None]
    offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    sum_exp_weight = tl.load(sum_exp_weight_ptr + offs, mask=mask & labelled[:, None], other=0.0)
    # Without competitors (V = 1, or all of them at -inf) both sums are 0.
    mean_weight = sum_exp_weight / tl.where(sum_exp == 0, 1.0, sum_exp)[:, None]
    logp = tl.load(logp_ptr + offs_n, mask=mask_n, other=0.0)
    direction = tl.where((logp == logp)[:, None], scale * (label_weight - mean_weight), 0.0)
    tl.store(out_ptr + offs, rounded(direction, out_ptr.dtype.element_ty), mask=mask)


def sweep_with_direction(sweep: Sweep, workspace_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sweep over all of the vocabulary. Returns logp, anchor, sum_exp [N] and direction [N, D]."""
    hidden, weight, block_v = sweep.hidden, sweep.weight, sweep.config.block_v
    anchor_N, sum_exp_N = empty_sums(sweep.rows, hidden.device)
    sum_exp_weight_ND = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    chunks = _chunks(sweep, workspace_bytes)
    workspace = hidden.new_empty(sweep.rows * min(max(map(len, chunks), default=0) * block_v, sweep.vocab))
    logp_N = torch.empty_like(anchor_N)
    for tiles in chunks:
        columns = slice(tiles.start * block_v, min(tiles.stop * block_v, sweep.vocab))
        width = columns.stop - columns.start
        tile_NC = workspace[: sweep.rows * width].view(sweep.rows, width)
        sweep.run(tiles, min_anchor=anchor_N, out=tile_NC)
        logp_N = merge_tiles(
            sweep.anchor_TN, sweep.sum_exp_TN, tiles, anchor_N, sum_exp_N, sweep.labels, sweep.ignore_index,
            target_N=sweep.target_N if tiles == chunks[-1] else None,
            matrix_ND=None if tiles == chunks[0] else sum_exp_weight_ND,
        )  # fmt: skip
        rescale(tile_NC, sweep.anchor_TN, anchor_N, tiles, block_v)
        DenseGemm.accumulate(sum_exp_weight_ND, tile_NC, weight[columns])
    return logp_N, anchor_N, sum_exp_N, _direction(sweep, sum_exp_weight_ND, logp_N, sum_exp_N)


def _chunks(sweep: Sweep, workspace_bytes: int) -> list[range]:
    """The vocabulary tiles in chunks that fit the workspace. If there are several, the first one is at most a wave."""
    size = tiles_per_chunk(sweep.rows * sweep.hidden.element_size(), sweep.config.block_v, workspace_bytes)
    first = min(sweep.wave().stop, size) if size < sweep.tiles_v else 0
    starts = sorted({0, *range(first, sweep.tiles_v, size), sweep.tiles_v})
    return [range(*pair) for pair in itertools.pairwise(starts)]


def new_direction(hidden: Tensor, rows: int) -> Tensor:
    """A direction [rows, D]. In float16 it may overflow although the gradient, direction * (1 - p_y), does not."""
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return hidden.new_empty(rows, hidden.shape[1], dtype=dtype)


def _direction(sweep: Sweep, sum_exp_weight_ND: Tensor, logp_N: Tensor, sum_exp_N: Tensor) -> Tensor:
    """The direction [N, D], from sum u_v slope_v W_v at the final anchors."""
    rows, dim = sum_exp_weight_ND.shape
    out = new_direction(sweep.hidden, rows)
    if rows and dim:
        blocks = triton.cdiv(rows, BLOCK_N), triton.cdiv(dim, BLOCK_D)
        _direction_kernel[blocks](
            sum_exp_weight_ND, sweep.weight, sweep.labels, sweep.target_N, logp_N, sum_exp_N, out, rows, sweep.vocab,
            dim, *sweep.weight.stride(), sweep.scale, 1.0 if sweep.softcap is None else sweep.softcap,
            sweep.ignore_index,
            HAS_SOFTCAP=sweep.softcap is not None, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return out
