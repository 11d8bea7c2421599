"""Gradients of a head's hidden states, weight and bias on a GPU, from the gradient of its logits.

The gradient of a token's unscaled logits is given by three numbers. With y the label, x_v = z_v - anchor ln 2 (anchors:
see primitives.py) and u_v = exp(x_v),

    grad_target                              at v = y
    u_v * (exp_factor + log_factor * x_v)    elsewhere

both times the slope of the soft cap. log_factor is nonzero only if the entropy has a gradient. A kernel writes the
gradient of a chunk of columns in the dtype of the inputs. Two GEMMs form grad_weight of the chunk, written once, and
add to grad_hidden, in float32. Where forward kept u (kept.py), only the GEMMs remain, unless the bias needs a gradient
or the dtype is float16.

Floating-point operations: 3G, 1G = 2 N D V; 2G of kept chunks. Bytes moved beyond the operands: 3 N V entries.
With `sparse_grad`, which announces tokens without a label or a gradient, blocks of such tokens skip all of it. With a
log_factor they skip the recomputation.

The kernels never wait for the device and use no atomics, so equal inputs give equal bits.
Legend: N tokens, D hidden, V vocabulary, C vocabulary columns of a chunk of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS, grid, tile_config
from .gemm import BlockSparseGemm, DenseGemm
from .kept import KeptChunks, kept_factor
from .primitives import NEGLIGIBLE, log2_anchored, logits_tile, rounded, slope_of, tile_position
from .sweep import tile_arguments


@dataclass(frozen=True)
class LogitGrads:
    """The three numbers of every token and its anchor [N], in float32; all three are 0 where ignored.

    log_factor is multiplied by ln 2, because the kernel has log2(u); None: 0 for all tokens. sum_exp, the sum of the
    kept u, is read only with kept tiles.
    """

    anchor: Tensor
    grad_target: Tensor
    exp_factor: Tensor
    log_factor: Tensor | None = None
    sum_exp: Tensor | None = None

    def nonzero(self) -> Tensor:
        """Whether the gradient of a token's logits is not all zeros: bool [N]."""
        nonzero = (self.grad_target != 0) | (self.exp_factor != 0)
        return nonzero if self.log_factor is None else nonzero | (self.log_factor != 0)


@triton.jit
def _gradient_kernel(
    hidden, weight, bias_ptr, labels_ptr, anchor_ptr, exp_factor_ptr, log_factor_ptr, grad_target_ptr, kept_ptr,
    out_ptr, grad_bias_partial_ptr, N, V, D, first_tile_v, end_tile_v, out_columns,
    stride_hidden_n, stride_hidden_d, stride_weight_v, stride_weight_d, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOG: tl.constexpr, KEPT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr, SKIP_ZEROS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr, GROUP_N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of unscaled logits, of the columns C of a chunk, to out [N, C]. KEPT: u is read, not recomputed.

    HAS_LOG: log_factor is not 0; it is in units of log2(u), and nothing is kept.
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
        if HAS_LOG:  # any of the three may be the only nonzero one; else exp_factor and grad_target are 0 together
            log_factor = tl.load(log_factor_ptr + offs_n, mask=mask_n, other=0.0)
            nonzero |= (log_factor != 0) | (tl.load(grad_target_ptr + offs_n, mask=mask_n, other=0.0) != 0)
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
            exponent = log2_anchored(z, anchor[:, None])
            u = tl.exp2(exponent)
        # Tokens without a gradient may have any logits, and unrelated anchors, so that the exponential overflows.
        if HAS_LOG:
            factor = exp_factor[:, None] + log_factor[:, None] * tl.maximum(exponent, -NEGLIGIBLE)
            gradient = tl.where(nonzero[:, None], factor * u, 0.0)
        else:
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


def head_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, grads: LogitGrads, kept: Tensor, scale: float,
    softcap: float | None, needs_hidden: bool, needs_weight: bool, needs_bias: bool, sparse_grad: bool,
    workspace_bytes: int, grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V]; empty where not needed.

    The gradient of the weight is written to `grad_weight` if that is given. `kept`: the memory of kept tiles.
    """
    if grad_weight is None:
        grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    rows, vocab, has_log = hidden.shape[0], weight.shape[0], grads.log_factor is not None
    config = tile_config(hidden, softcap, column_divisor=2 if has_log else 1)
    grad_hidden_ND = hidden.new_zeros(hidden.shape if needs_hidden else 0, dtype=torch.float32)
    if rows == 0:
        grad_weight.zero_()
    tiles_n = triton.cdiv(rows, config.block_n)
    grad_bias_partial = hidden.new_empty((tiles_n, vocab) if needs_bias else 0, dtype=torch.float32)

    nonzero_N = grads.nonzero()
    # Tokens without a gradient may have any hidden states: 0 * NaN would spoil the weight's gradient.
    used_hidden = hidden.masked_fill(~nonzero_N[:, None], 0.0) if needs_weight else hidden
    gemms = BlockSparseGemm.of(nonzero_N, config) if sparse_grad else DenseGemm
    kept_chunks = KeptChunks(kept, hidden, vocab, config.block_v, softcap, workspace_bytes)
    workspace = hidden.new_empty(rows * max((kept_chunks.width(tiles) for tiles in kept_chunks.chunks), default=0))
    arguments = {
        **tile_arguments(hidden, weight, bias, scale, softcap, config), "labels_ptr": labels.contiguous(),
        "anchor_ptr": grads.anchor, "exp_factor_ptr": grads.exp_factor, "log_factor_ptr": grads.log_factor,
        "grad_target_ptr": grads.grad_target, "grad_bias_partial_ptr": grad_bias_partial, "N": rows, "V": vocab,
        "D": hidden.shape[1], "HAS_LOG": has_log, "NEEDS_BIAS": needs_bias,
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
        sum_exp_N = cast(Tensor, grads.sum_exp)  # given wherever tiles are kept
        factor_N1 = kept_factor(grads.exp_factor, sum_exp_N, hidden.dtype)[:, None]
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
            SKIP_ZEROS=(sparse_grad or has_log) and not is_kept, **COMPILER_OPTIONS,
        )  # fmt: skip
        add_chunk(tiles, grad_NC, used_hidden)
    # In the memory layout of hidden, as the op's fake implementation declares.
    grad_hidden = torch.empty_like(hidden).copy_(grad_hidden_ND) if needs_hidden else hidden.new_empty(0)
    return grad_hidden, grad_weight, grad_bias_partial.sum(0).to(hidden.dtype)
