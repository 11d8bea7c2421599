"""Matrix products outside the fused kernels: dense ones on cuBLAS or hipBLAS, and block-sparse ones of our own.

    accumulate:  out [N, D] += a [N, K] @ b [K, D]          product:  out [C, D] = a [N, C].T @ b [N, D]

Both accumulate in float32. The block-sparse kernels skip the row blocks of `a` that are all zeros. The indices and the
number of the other blocks stay on the device, so the host never waits for it. Vendor GEMMs cannot read a size there.

Bytes moved: the operands and the output, less the skipped blocks.
Legend: N tokens (rows), K and C columns of `a`, D hidden, R rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS, TileConfig, precision
from .primitives import load_tile, rounded


class DenseGemm:
    """The products over all rows, on cuBLAS or hipBLAS."""

    @staticmethod
    def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [N, D] (float32) += a [N, K] @ b [K, D]. Products of half-precision operands are not rounded."""
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out)
        elif out.is_cuda:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:  # in the interpreter: the CPU has no float32 product of half-precision operands
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)

    @staticmethod
    def product(out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [C, D] = a [N, C].T @ b [N, D], accumulated in float32 and rounded once."""
        if a.is_cuda or a.dtype == torch.float32:
            torch.mm(a.T, b, out=out)
        else:
            out.copy_(a.T.float() @ b.float())


@triton.jit
def _block_sparse_kernel(
    a_ptr, b_ptr, out_ptr, blocks_ptr, n_blocks_ptr, N, K, D, stride_a, stride_b_k, stride_b_d,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, D] += a [N, K] @ b [K, D] for the row blocks in blocks[:n_blocks]."""
    if tl.program_id(0) < tl.load(n_blocks_ptr):
        row = tl.load(blocks_ptr + tl.program_id(0)).to(tl.int32) * BLOCK_R
        col = tl.program_id(1) * BLOCK_D
        offs_n = row + tl.arange(0, BLOCK_R)
        offs_d = col + tl.arange(0, BLOCK_D)
        offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
        acc = tl.load(out_ptr + offs, mask=mask, other=0.0)
        for k in range(0, K, BLOCK_K):
            a = load_tile(a_ptr, row, k, N, K, stride_a, 1, BLOCK_R, BLOCK_K, False)
            b = load_tile(b_ptr, k, col, K, D, stride_b_k, stride_b_d, BLOCK_K, BLOCK_D, False)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        tl.store(out_ptr + offs, acc, mask=mask)


@triton.jit
def _block_sparse_transposed_kernel(
    a_ptr, b_ptr, out_ptr, blocks_ptr, n_blocks_ptr, N, C, D, stride_a, stride_b_n, stride_b_d,
    stride_out_c, stride_out_d,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [C, D] = a [N, C].T @ b [N, D], summed over the row blocks in blocks[:n_blocks], BLOCK_K rows at a time."""
    row_a = tl.program_id(0) * BLOCK_C
    col = tl.program_id(1) * BLOCK_D
    acc = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    steps = BLOCK_R // BLOCK_K
    for i in range(tl.load(n_blocks_ptr) * steps):
        row = tl.load(blocks_ptr + i // steps).to(tl.int32) * BLOCK_R + i % steps * BLOCK_K
        a = load_tile(a_ptr, row, row_a, N, C, stride_a, 1, BLOCK_K, BLOCK_C, False)
        b = load_tile(b_ptr, row, col, N, D, stride_b_n, stride_b_d, BLOCK_K, BLOCK_D, False)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    offs_c = row_a + tl.arange(0, BLOCK_C)
    offs_d = col + tl.arange(0, BLOCK_D)
    offs = offs_c.to(tl.int64)[:, None] * stride_out_c + offs_d.to(tl.int64)[None, :] * stride_out_d
    mask = (offs_c < C)[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + offs, rounded(acc, out_ptr.dtype.element_ty), mask=mask)


@dataclass
class BlockSparseGemm:
    """The products over the row blocks that contain a nonzero row. They are found without a device sync."""

    blocks: Tensor  # [B], indices of all row blocks, nonzero blocks first and in ascending order
    count: Tensor  # number of nonzero blocks, a scalar on the device
    config: TileConfig

    @classmethod
    def of(cls, nonzero_N: Tensor, config: TileConfig) -> BlockSparseGemm:
        """`nonzero_N`: a bool mask of the rows that are not all zeros."""
        rows, size = nonzero_N.shape[0], config.block_n
        padded = torch.nn.functional.pad(nonzero_N, (0, -rows % size))
        nonzero_B = padded.view(triton.cdiv(rows, size), size).any(1)
        return cls(torch.argsort(nonzero_B, descending=True, stable=True), nonzero_B.sum(), config)

    def accumulate(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [N, D] (float32) += a [N, K] @ b [K, D]. Rows of skipped blocks keep their values."""
        (rows, depth), dim = a.shape, b.shape[1]
        sizes, options = self._launch_options()
        _block_sparse_kernel[self.blocks.shape[0], triton.cdiv(dim, sizes["BLOCK_D"])](
            a, b, out, self.blocks, self.count, rows, depth, dim, a.stride(0), *b.stride(), **sizes, **options,
            **COMPILER_OPTIONS,
        )  # fmt: skip

    def product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [C, D] = a [N, C].T @ b [N, D] over the nonzero blocks, accumulated in float32 and rounded once."""
        (rows, columns), dim = a.shape, b.shape[1]
        sizes, options = self._launch_options()
        block_c = sizes["BLOCK_D"]
        _block_sparse_transposed_kernel[triton.cdiv(columns, block_c), triton.cdiv(dim, block_c)](
            a, b, out, self.blocks, self.count, rows, columns, dim, a.stride(0), *b.stride(), *out.stride(),
            BLOCK_C=block_c, **sizes, **options, **COMPILER_OPTIONS,
        )  # fmt: skip

    def _launch_options(self) -> tuple[dict, dict]:
        """The constants of both kernels, and the options of the launch."""
        side, depth = min(self.config.block_n, 128), min(self.config.block_d, 32)
        sizes = {"PRECISION": precision(), "BLOCK_R": self.config.block_n, "BLOCK_D": side, "BLOCK_K": depth}
        # With 4 warps a tile of 128 x 128 spills registers under Triton 3.9.
        return sizes, {"num_warps": 8, "num_stages": self.config.num_stages}
