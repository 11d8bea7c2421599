"""Products that are left as plain GEMMs.

The vendor's, with float32 accumulation into an output that exists; and, where many rows are known to be zeros, two of
our own that walk only the blocks of rows that are not. Which blocks those are, and how many, stays on the device.
Legend: N rows, K and C columns of a [N, .] matrix, D hidden, R rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILER_OPTIONS, TileConfig, precision
from .primitives import load_tile, rounded


class AllRows:
    """The vendor's GEMMs over every row."""

    @staticmethod
    def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [N, D] (float32) += a [N, K] @ b [K, D]. Products of half-precision operands are never rounded."""
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out)
        elif out.is_cuda:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:  # under the interpreter: the CPU has no product of half-precision operands into float32
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)

    @staticmethod
    def product(out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [C, D] = a [N, C].T @ b [N, D], accumulated in float32 and rounded once."""
        if a.is_cuda or a.dtype == torch.float32:
            torch.mm(a.T, b, out=out)
        else:
            out.copy_(a.T.float() @ b.float())


@triton.jit
def _live_rows_kernel(
    a_ptr, b_ptr, out_ptr, blocks_ptr, n_blocks_ptr, N, K, D, stride_a, stride_b_k, stride_b_d,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, D] += a [N, K] @ b [K, D] in the live blocks of rows."""
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
def _live_sum_kernel(
    a_ptr, b_ptr, out_ptr, blocks_ptr, n_blocks_ptr, N, C, D, stride_a, stride_b_n, stride_b_d,
    stride_out_c, stride_out_d,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [C, D] = a [N, C].T @ b [N, D], summed over the live blocks of rows, BLOCK_K rows at a time."""
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
class LiveBlocks:
    """The blocks of rows in which some row is not zero, found on the device: nothing waits for it."""

    blocks: Tensor  # [B], the live ones first, in their order
    count: Tensor  # scalar
    config: TileConfig

    @classmethod
    def of(cls, live_N: Tensor, config: TileConfig) -> LiveBlocks:
        rows, size = live_N.shape[0], config.block_n
        padded = torch.nn.functional.pad(live_N, (0, -rows % size))
        live_B = padded.view(triton.cdiv(rows, size), size).any(1)
        return cls(torch.argsort(live_B, descending=True, stable=True), live_B.sum(), config)

    def accumulate(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [N, D] (float32) += a [N, K] @ b [K, D]; rows of dead blocks stay as they are."""
        (rows, depth), dim = a.shape, b.shape[1]
        sizes, options = self._launch(a)
        _live_rows_kernel[self.blocks.shape[0], triton.cdiv(dim, sizes["BLOCK_D"])](
            a, b, out, self.blocks, self.count, rows, depth, dim, a.stride(0), *b.stride(), **sizes, **options,
            **COMPILER_OPTIONS,
        )  # fmt: skip

    def product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out [C, D] = a [N, C].T @ b [N, D] over the live blocks, accumulated in float32 and rounded once."""
        (rows, columns), dim = a.shape, b.shape[1]
        sizes, options = self._launch(a)
        block_c = sizes["BLOCK_D"]
        _live_sum_kernel[triton.cdiv(columns, block_c), triton.cdiv(dim, block_c)](
            a, b, out, self.blocks, self.count, rows, columns, dim, a.stride(0), *b.stride(), *out.stride(),
            BLOCK_C=block_c, **sizes, **options, **COMPILER_OPTIONS,
        )  # fmt: skip

    def _launch(self, a: Tensor) -> tuple[dict, dict]:
        side, depth = min(self.config.block_n, 128), min(self.config.block_d, 32)
        sizes = {"PRECISION": precision(), "BLOCK_R": self.config.block_n, "BLOCK_D": side, "BLOCK_K": depth}
        return sizes, {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
