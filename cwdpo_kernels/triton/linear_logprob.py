"""linear_logprob on a GPU: the algebra of portable/linear_logprob.py, one vocabulary chunk at a time.

The competitors of a label y are all v != y. With u_v = exp(z_v - anchor ln 2) and sum_exp = sum u_v over them:

    logp = -log1p(exp(anchor ln 2 - z_y) * sum_exp)
    d logp / d z_y = 1 - p_y,   d logp / d z_v = -(1 - p_y) u_v / sum_exp
    direction = scale * (slope_y W_y - sum u_v slope_v W_v / sum_exp),   d logp / d h = (1 - p_y) * direction

Floating-point operations, with 1G = 2 N D V, and bytes moved beyond the operands:

    no gradient      1G   one sweep; 8 N T
    frozen head      2G   forward also writes u, a chunk at a time in the dtype of the inputs, and a dense GEMM
                          accumulates sum u_v slope_v W_v in float32; backward scales rows (in ops/). 2 N V tile entries
    trainable head   3G   forward sweeps and keeps tiles of u (kept.py); backward is in gradients.py. 3 N V tile entries
                     4G   for tiles that were not kept, which backward recomputes. 3 N V tile entries

Kept tiles lie in the memory of grad_weight; backward reads each one before it overwrites it. With `sparse_grad`, which
announces tokens without a label or a gradient, blocks of such tokens skip the sweep, the recomputation and both GEMMs.

The kernels never wait for the device and use no atomics, so equal inputs give equal bits.
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
from .gradients import LogitGrads, head_gradients
from .kept import KeptChunks, tiles_per_chunk
from .primitives import logit_gradient, rounded, slope_of
from .sweep import Sweep

DIRECTION_BLOCK_N, DIRECTION_BLOCK_D = 16, 128


@triton.jit
def _direction_kernel(
    sum_exp_weight_ptr, weight_ptr, labels_ptr, target_ptr, sum_exp_ptr, out_ptr, N, V, D, stride_weight_v,
    stride_weight_d, scale, softcap, ignore_index, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = scale * (slope_y W_y - sum_exp_weight / sum_exp); 0 where ignored."""
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
    direction = scale * (label_weight - mean_weight)
    tl.store(out_ptr + offs, rounded(direction, out_ptr.dtype.element_ty), mask=mask)


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, with_direction: bool, sparse_grad: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp [N], anchor [N], sum_exp [N], direction [N, D] (or empty), kept tiles (opaque bytes or [V, D])."""
    labels = labels.contiguous()
    sweep = Sweep(hidden, weight, bias, labels, scale, softcap, ignore_index, skip_ignored=sparse_grad)
    opaque = kept_bytes is not None and kept_bytes >= 0
    kept = hidden.new_empty(kept_bytes or 0, dtype=torch.uint8) if opaque else torch.empty_like(weight)
    if with_direction:
        return *_forward_frozen(sweep, workspace_bytes), kept

    kept_chunks = KeptChunks(kept, hidden, sweep.vocab, sweep.config.block_v, softcap, workspace_bytes)
    if kept_bytes is None or kept_bytes >= 0:
        kept_chunks.zero_unused()
    return *kept_chunks.fill(sweep), hidden.new_empty(0, hidden.shape[1]), kept


def _forward_frozen(sweep: Sweep, workspace_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, anchor, sum_exp [N] and direction [N, D]."""
    hidden, weight, block_v = sweep.hidden, sweep.weight, sweep.config.block_v
    anchor_N, sum_exp_N = empty_sums(sweep.rows, hidden.device)
    sum_exp_weight_ND = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    chunks = _frozen_chunks(sweep, workspace_bytes)
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
    return logp_N, anchor_N, sum_exp_N, _direction(sweep, sum_exp_weight_ND, sum_exp_N)


def _frozen_chunks(sweep: Sweep, workspace_bytes: int) -> list[range]:
    """The vocabulary tiles in chunks that fit the workspace. If there are several, the first one is at most a wave."""
    size = tiles_per_chunk(sweep.rows * sweep.hidden.element_size(), sweep.config.block_v, workspace_bytes)
    first = min(sweep.wave().stop, size) if size < sweep.tiles_v else 0
    starts = sorted({0, *range(first, sweep.tiles_v, size), sweep.tiles_v})
    return [range(*pair) for pair in itertools.pairwise(starts)]


def _direction(sweep: Sweep, sum_exp_weight_ND: Tensor, sum_exp_N: Tensor) -> Tensor:
    rows, dim = sum_exp_weight_ND.shape
    dtype = sweep.hidden.dtype
    # In float16 the direction may overflow although the gradient, direction * (1 - p_y), does not.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    out = torch.empty(rows, dim, dtype=dtype, device=sweep.hidden.device)
    if rows and dim:
        blocks = triton.cdiv(rows, DIRECTION_BLOCK_N), triton.cdiv(dim, DIRECTION_BLOCK_D)
        _direction_kernel[blocks](
            sum_exp_weight_ND, sweep.weight, sweep.labels, sweep.target_N, sum_exp_N, out, rows, sweep.vocab, dim,
            *sweep.weight.stride(), sweep.scale, 1.0 if sweep.softcap is None else sweep.softcap, sweep.ignore_index,
            HAS_SOFTCAP=sweep.softcap is not None, BLOCK_N=DIRECTION_BLOCK_N, BLOCK_D=DIRECTION_BLOCK_D,
            **COMPILER_OPTIONS,
        )  # fmt: skip
    return out


def linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V] for a trainable head; empty where not needed.

    The gradient of the weight is written to `grad_weight` if that is given.
    """
    grad_target, exp_factor = logit_gradient(grad_logp, labels, logp, sum_exp, ignore_index, scale)
    grads = LogitGrads(anchor, grad_target, exp_factor, sum_exp=sum_exp)
    return head_gradients(
        hidden, weight, bias, labels, grads, kept, scale, softcap, needs_hidden, needs_weight, needs_bias, sparse_grad,
        workspace_bytes, grad_weight,
    )  # fmt: skip


def linear_logprob_backward_(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, with the gradient of the weight written over `kept` [V, D], which holds the kept tiles."""
    grad_hidden, _, grad_bias = linear_logprob_backward(
        grad_logp, hidden, weight, bias, labels, logp, anchor, sum_exp, kept, scale, softcap, ignore_index,
        needs_hidden, True, needs_bias, sparse_grad, workspace_bytes, grad_weight=kept,
    )  # fmt: skip
    return grad_hidden, grad_bias
