"""linear_logprob on a GPU: the algebra of portable/linear_logprob.py, one vocabulary chunk at a time.

The competitors of a label y are all v != y. With u_v = exp(z_v - anchor ln 2) and sum_exp = sum u_v over them:

    logp = -log1p(exp(anchor ln 2 - z_y) * sum_exp)
    d logp / d z_y = 1 - p_y,   d logp / d z_v = -(1 - p_y) u_v / sum_exp
    direction = scale * (slope_y W_y - sum u_v slope_v W_v / sum_exp),   d logp / d h = (1 - p_y) * direction

Floating-point operations, with 1G = 2 N D V, and bytes moved beyond the operands:

    no gradient      1G   one sweep; 8 N T
    frozen head      2G   forward also writes u, a chunk at a time in the dtype of the inputs, and a dense GEMM
                          accumulates sum u_v slope_v W_v in float32; backward scales rows (in ops/). 2 N V tile entries
    trainable head   3G   forward sweeps and keeps tiles of u (kept.py). In backward, two GEMMs per chunk form
                          grad_weight, written once, and grad_hidden, in float32. 3 N V tile entries
                     4G   for tiles that were not kept, backward computes the gradient of their logits, in the dtype of
                          the inputs, for the same GEMMs. 3 N V tile entries

Kept tiles lie in the memory of grad_weight; backward reads each one before it overwrites it. With `sparse_grad`, which
announces tokens without a label or a gradient, blocks of such tokens skip the sweep, the recomputation and both GEMMs.

The kernels never wait for the device and use no atomics, so equal inputs give equal bits.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles of BLOCK_V, C vocabulary columns of a chunk of tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import empty_sums, merge_tiles, rescale
from .configs import COMPILER_OPTIONS, grid, tile_config
from .gemm import BlockSparseGemm, DenseGemm
from .kept import KeptChunks, kept_factor, tiles_per_chunk
from .primitives import exp_anchored, logit_gradient, logits_tile, rounded, slope_of, tile_position
from .sweep import Sweep, tile_arguments

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
    chunk = tiles_per_chunk(sweep.rows * hidden.element_size(), block_v, workspace_bytes)
    workspace = hidden.new_empty(sweep.rows * min(chunk * block_v, sweep.vocab))
    for start in range(0, sweep.tiles_v, chunk):
        tiles = range(start, min(start + chunk, sweep.tiles_v))
        columns = slice(tiles.start * block_v, min(tiles.stop * block_v, sweep.vocab))
        width = columns.stop - columns.start
        tile_NC = workspace[: sweep.rows * width].view(sweep.rows, width)
        before_N = anchor_N.clone()
        sweep.run(tiles, min_anchor=before_N, out=tile_NC)
        merge_tiles(sweep.anchor_TN, sweep.sum_exp_TN, tiles, anchor_N, sum_exp_N, sweep.labels, sweep.ignore_index)
        rescale(tile_NC, sweep.anchor_TN, anchor_N, tiles, block_v)
        rescale(sum_exp_weight_ND, before_N[None], anchor_N, range(1), triton.next_power_of_2(hidden.shape[1]))
        DenseGemm.accumulate(sum_exp_weight_ND, tile_NC, weight[columns])
    logp_N = merge_tiles(  # all tiles are merged already: an empty range only computes logp
        sweep.anchor_TN, sweep.sum_exp_TN, range(0), anchor_N, sum_exp_N, sweep.labels, sweep.ignore_index,
        sweep.target_N,
    )  # fmt: skip
    return logp_N, anchor_N, sum_exp_N, _direction(sweep, sum_exp_weight_ND, sum_exp_N)


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


@triton.jit
def _gradient_kernel(
    hidden, weight, bias_ptr, labels_ptr, anchor_ptr, exp_factor_ptr, grad_target_ptr, kept_ptr, out_ptr,
    grad_bias_partial_ptr, N, V, D, first_tile_v, end_tile_v, out_columns,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, KEPT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    SKIP_ZEROS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
    GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of unscaled logits, slope * (grad_target at the label, exp_factor * u elsewhere), to out [N, C].

    NEEDS_BIAS also writes the sum over each block of tokens to grad_bias_partial [blocks, V].
    """
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
        anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
        exp_factor = tl.load(exp_factor_ptr + offs_n, mask=mask_n, other=0.0)
        labels = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
        nonzero = exp_factor != 0
        if KEPT:
            offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
            offs_kept = offs_n.to(tl.int64)[:, None] * out_columns + offs_c[None, :]
            mask_kept = mask_n[:, None] & (offs_c < out_columns)[None, :]
            u = tl.load(kept_ptr + offs_kept, mask=mask_kept, other=0.0).to(tl.float32)
        else:
            if SKIP_ZEROS:  # a block whose gradient is all zeros has a loop of zero steps
                depth = tl.where(tl.max(nonzero.to(tl.int32), 0) > 0, D, 0)
            else:
                depth = D
                if FLATTEN:
                    tl.assume(D > 0)  # else the loop has a second copy of the epilogue, for products of zero steps
            z = logits_tile(
                hidden, weight, bias_ptr, row, col, N, V, depth, stride_hidden_n, stride_hidden_d, stride_weight_v,
                stride_weight_d, scale, softcap, HAS_BIAS, HAS_SOFTCAP, PRECISION, DESCRIPTORS, BLOCK_N,
                BLOCK_V, BLOCK_D,
            )  # fmt: skip
            u = exp_anchored(z, anchor[:, None])
        # Tokens without a gradient may have any logits, and unrelated anchors, so that the exponential overflows.
        gradient = tl.where(nonzero[:, None], exp_factor[:, None] * u, 0.0)
        holds_label = (labels >= col) & (labels < col + BLOCK_V)
        if tl.max(holds_label.to(tl.int32), 0) > 0:  # few tiles hold a label of their tokens
            # Replaces the exponential of the target logit, which may have overflowed.
            grad_target = tl.load(grad_target_ptr + offs_n, mask=mask_n, other=0.0)
            gradient = tl.where(offs_v[None, :] == labels[:, None], grad_target[:, None], gradient)
        if HAS_SOFTCAP:
            gradient = tl.where(nonzero[:, None], gradient * slope_of(z, softcap), 0.0)
        if NEEDS_BIAS:
            offs_partial = pid_n.to(tl.int64) * V + offs_v
            tl.store(grad_bias_partial_ptr + offs_partial, tl.sum(gradient, 0), mask=offs_v < V)
        offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)  # computed after the product, which needs all registers
        offs_out = offs_n.to(tl.int64)[:, None] * out_columns + offs_c[None, :]
        mask_out = mask_n[:, None] & (offs_c < out_columns)[None, :]
        tl.store(out_ptr + offs_out, rounded(gradient, out_ptr.dtype.element_ty), mask=mask_out)


def linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V] for a trainable head; empty where not needed.

    The gradient of the weight is written to `grad_weight` if that is given.
    """
    if grad_weight is None:
        grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    rows, vocab, config = hidden.shape[0], weight.shape[0], tile_config(hidden, softcap)
    grad_target_N, exp_factor_N = logit_gradient(grad_logp, labels, logp, sum_exp, ignore_index, scale)
    grad_hidden_ND = hidden.new_zeros(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    if rows == 0:
        grad_weight.zero_()
    tiles_n = triton.cdiv(rows, config.block_n)
    grad_bias_partial = hidden.new_empty((tiles_n, vocab) if needs_bias else 0, dtype=torch.float32)

    nonzero_N = (grad_target_N != 0) | (exp_factor_N != 0)
    # Tokens without a gradient may have any hidden states: 0 * NaN would spoil the weight's gradient.
    used_hidden = hidden.masked_fill(~nonzero_N[:, None], 0.0) if needs_weight else hidden
    gemms = BlockSparseGemm.of(nonzero_N, config) if sparse_grad else DenseGemm
    kept_chunks = KeptChunks(kept, hidden, vocab, config.block_v, softcap, workspace_bytes)
    workspace = hidden.new_empty(rows * max((kept_chunks.width(tiles) for tiles in kept_chunks.chunks), default=0))
    arguments = {
        **tile_arguments(hidden, weight, bias, scale, softcap, config), "labels_ptr": labels.contiguous(),
        "anchor_ptr": anchor, "exp_factor_ptr": exp_factor_N, "grad_target_ptr": grad_target_N,
        "grad_bias_partial_ptr": grad_bias_partial, "N": rows, "V": vocab, "D": hidden.shape[1],
        "NEEDS_BIAS": needs_bias,
    }  # fmt: skip

    def add_chunk(tiles: range, grad_NC: Tensor, hidden_ND: Tensor) -> None:
        start = tiles.start * config.block_v
        columns = slice(start, start + kept_chunks.width(tiles))
        if needs_hidden:
            gemms.accumulate(grad_hidden_ND, grad_NC, weight[columns])
        if needs_weight:
            gemms.product(grad_weight[columns], grad_NC, hidden_ND)

    def workspace_for(tiles: range) -> Tensor:
        width = kept_chunks.width(tiles)
        return workspace[: rows * width].view(rows, width)

    # Float16 does not reach as far as sum_exp, or as exp_factor * hidden. The bias needs sums of the gradient.
    factored = len(kept_chunks.views) if hidden.dtype != torch.float16 and not needs_bias else 0
    if factored:
        factor_N1 = kept_factor(exp_factor_N, sum_exp, hidden.dtype)[:, None]
        scaled_hidden = torch.mul(used_hidden, factor_N1, out=torch.empty_like(used_hidden)) if needs_weight else hidden
        for tiles in kept_chunks.chunks[:factored]:
            u_NC = kept_chunks.views[tiles.start]
            outlives = kept_chunks.outlives_its_gradient(tiles)
            add_chunk(tiles, u_NC if outlives else workspace_for(tiles).copy_(u_NC), scaled_hidden)
        if needs_hidden:
            grad_hidden_ND *= factor_N1
    for tiles in kept_chunks.chunks[factored:]:
        grad_NC, is_kept = workspace_for(tiles), tiles.start in kept_chunks.views
        _gradient_kernel[grid(config, tiles_n * len(tiles), hidden.device)](
            **arguments, kept_ptr=kept_chunks.views.get(tiles.start, grad_NC), out_ptr=grad_NC,
            first_tile_v=tiles.start, end_tile_v=tiles.stop, out_columns=kept_chunks.width(tiles), KEPT=is_kept,
            SKIP_ZEROS=sparse_grad and not is_kept, **COMPILER_OPTIONS,
        )  # fmt: skip
        add_chunk(tiles, grad_NC, used_hidden)
    # In the memory layout of hidden, as the op's fake implementation declares.
    grad_hidden = torch.empty_like(hidden).copy_(grad_hidden_ND) if needs_hidden else hidden.new_empty(0)
    return grad_hidden, grad_weight, grad_bias_partial.sum(0).to(hidden.dtype)


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
