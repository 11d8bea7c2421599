"""Products that are left as plain GEMMs: the vendor's, with float32 accumulation into an output that exists."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (float32) = a @ b, or += where not `first`. The products of half-precision operands are never rounded."""
    beta = 0.0 if first else 1.0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # under the interpreter: the CPU has no product of half-precision operands into float32
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, accumulated in float32 and rounded once."""
    if a.is_cuda or a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())
