"""Scaled dot-product attention over a token tree: a token sees the tokens before it on its path from the root.

    out_i = sum_j softmax_j(softcap(scale * q_i . k_j)) v_j        j in the path of i, and i - j < window on the path

Three kernels compute it. `choose` picks the default; the argument `kernel` names one:

- `flash_cpu`, `math`: rectangle by rectangle (blocks.py, kernels.py). For backward they save the query, key, value,
  output and log-sum-exp, as any flash attention does. Without a window, they copy no keys.
- `varlen` (CUDA, bfloat16 and float16): one call of torch's variable-length flash attention over the gathered keys and
  values of all paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.autograd import FirstDerivative
from ..validation import FLOAT_DTYPES, check_choice, check_device, check_dtype, check_softcap, expect
from . import kernels
from .blocks import Block, blocks_of
from .kernels import Rectangle
from .layout import ROOT, TokenTree
from .varlen import varlen_attention, why_not_varlen

KERNELS = ("flash_cpu", "math", "varlen")
_OP = "tree_attention"
_FORWARD = {"flash_cpu": kernels.flash_cpu_forward, "math": kernels.math_forward}
_BACKWARD = {"flash_cpu": kernels.flash_cpu_backward, "math": kernels.math_backward}


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TokenTree,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    masks: Mapping[int, Tensor] | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Attention in which each token sees itself and the tokens before it on its path in `tree`.

        out_i = sum_j softmax_j(softcap(scale * q_i . k_j)) v_j        j on the path of i, up to i, i - j < window

    Args:
        query: [B, H, T, D], float32, bfloat16, float16 or float64
        key, value: [B, G, T, D] and [B, G, T, E], in the query's dtype; H is a multiple of G (grouped queries)
        tree: the layout of the token axis T
        scale: of the scores; the default is 1 / sqrt(D)
        window: a token sees the last `window` tokens of its path, itself included; None is all
        softcap: scores become softcap * tanh(score / softcap)
        masks: for some roots of n tokens, by index, a mask [n, n] that is added to the scores among them (0 or -inf,
            any floating-point dtype) in place of the causal mask and the window
        kernel: `flash_cpu`, `varlen` or `math`; the default is the first of them that supports device, dtype and
            options

    Returns out [B, H, T, E], in the query's dtype. Scores are computed in float32 (float64 for float64). Raises
    `ValueError` for arguments that do not fit, and `NotImplementedError` if the named kernel does not support them, and
    for second and forward-mode derivatives.
    """
    _check(query, key, value, tree, window, masks or {})
    check_softcap(_OP, "softcap", softcap, query.dtype)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kernel is None:
        kernel = choose(query, value, softcap, bool(masks))
    else:
        check_choice(_OP, "kernel", kernel, KERNELS)
        reason = _why_not(kernel, query, value, softcap, bool(masks))
        if reason is not None:
            raise NotImplementedError(f"{_OP}: kernel {kernel!r} {reason}")
    if kernel == "varlen":
        return varlen_attention(query, key, value, tree, scale, window)
    blocks = blocks_of(tree, window, masks or {}, query.dtype, query.device)
    out, _ = _BlockAttention.apply(query, key, value, blocks, scale, softcap, kernel)
    return out


def choose(query: Tensor, value: Tensor, softcap: float | None = None, masked: bool = False) -> str:
    """The default kernel: the first of `flash_cpu`, `varlen` and `math` that supports these arguments."""
    fast = ("flash_cpu", "varlen")
    return next((name for name in fast if _why_not(name, query, value, softcap, masked) is None), "math")


def _why_not(kernel: str, query: Tensor, value: Tensor, softcap: float | None, masked: bool) -> str | None:
    if kernel == "math":
        return None
    device = "cpu" if kernel == "flash_cpu" else "cuda"
    if query.device.type != device:
        return f"needs device {device}, got {query.device.type}"
    if softcap is not None:
        return "has no soft cap"
    if query.shape[-1] != value.shape[-1]:
        return f"needs values as wide as queries ({query.shape[-1]}), got {value.shape[-1]}"
    if kernel == "varlen":
        return why_not_varlen(query, masked)
    return None


def _check(
    query: Tensor, key: Tensor, value: Tensor, tree: TokenTree, window: int | None, masks: Mapping[int, Tensor]
) -> None:
    expect(isinstance(tree, TokenTree), _OP, "tree", "type", "TokenTree", type(tree).__name__)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dtype(_OP, name, tensor, FLOAT_DTYPES)
        expect(tensor.dim() == 4, _OP, name, "shape", "[B, heads, T, width]", list(tensor.shape))
        expect(tensor.shape[2] == tree.tokens, _OP, name, "tokens", f"{tree.tokens} (as tree)", tensor.shape[2])
        expect(tensor.dtype == query.dtype, _OP, name, "dtype", f"{query.dtype} (as query)", tensor.dtype)
        check_device(_OP, name, tensor, query, "query")
        expect(tensor.shape[0] == query.shape[0], _OP, name, "B", f"{query.shape[0]} (as query)", tensor.shape[0])
    expect(query.shape[3] >= 1, _OP, "query", "width", ">= 1", query.shape[3])
    expect(key.shape[1] >= 1, _OP, "key", "heads", ">= 1", key.shape[1])
    expect(key.shape[3] == query.shape[3], _OP, "key", "width", f"{query.shape[3]} (as query)", key.shape[3])
    expect(value.shape[1] == key.shape[1], _OP, "value", "heads", f"{key.shape[1]} (as key)", value.shape[1])
    expected = f"a multiple of {key.shape[1]} (as key)"
    expect(query.shape[1] % key.shape[1] == 0, _OP, "query", "heads", expected, query.shape[1])
    is_count = isinstance(window, int) and not isinstance(window, bool) and window >= 1
    expect(window is None or is_count, _OP, "window", "value", "an int >= 1, or None", window)
    for root, mask in masks.items():
        is_root = 0 <= root < len(tree.parents) and tree.parents[root] == ROOT
        expect(is_root, _OP, "masks", "keys", "indices of roots", root)
        check_dtype(_OP, f"masks[{root}]", mask, FLOAT_DTYPES)
        check_device(_OP, f"masks[{root}]", mask, query, "query")
        shape = [tree.lengths[root]] * 2
        expect(list(mask.shape) == shape, _OP, f"masks[{root}]", "shape", shape, list(mask.shape))


class _BlockAttention(torch.autograd.Function):
    """Attention rectangle by rectangle."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float, softcap: float | None, kernel: str
    ) -> tuple[Tensor, Tensor]:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # contiguous for the next layer
        lse = query.new_empty(batch, heads, tokens, dtype=kernels.accumulator(query.dtype))
        for block in blocks:
            rows = block.queries
            part_out, part_lse = _FORWARD[kernel](
                query[:, :, rows], _gathered(key, block), _gathered(value, block),
                Rectangle(block.causal, block.mask, scale, softcap),
            )  # fmt: skip
            if block.merges:
                part_out, part_lse = _merged(out[:, :, rows], lse[:, :, rows], part_out, part_lse)
            out[:, :, rows], lse[:, :, rows] = part_out, part_lse
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.blocks, ctx.scale, ctx.softcap, ctx.kernel = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return *_block_gradients(ctx, grad_out), None, None, None, None
        with torch.no_grad():
            grads = _block_gradients(ctx, grad_out)
        return *FirstDerivative.of(_OP, grads, (grad_out, *ctx.saved_tensors)), None, None, None, None


def _block_gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value; None for those that need none."""
    query, key, value, out, lse = ctx.saved_tensors
    # Without a window, the rectangles that do not merge are squares, they come first, and each token is in exactly one.
    # They initialize all gradients, so the memory need not be zeroed.
    squares = all(block.merges or block.keys == (block.queries,) for block in ctx.blocks)
    empty = torch.empty_like if squares else torch.zeros_like
    needed = ctx.needs_input_grad[:3]
    grads = tuple(empty(each) if need else None for each, need in zip((query, key, value), needed, strict=True))
    for block in ctx.blocks:
        rows = block.queries
        parts = _BACKWARD[ctx.kernel](
            grad_out[:, :, rows], query[:, :, rows], _gathered(key, block), _gathered(value, block),
            out[:, :, rows], lse[:, :, rows], Rectangle(block.causal, block.mask, ctx.scale, ctx.softcap),
        )  # fmt: skip
        for grad, part, spans in zip(grads, parts, ((rows,), block.keys, block.keys), strict=True):
            if grad is None:
                continue
            if squares and not block.merges:
                grad[:, :, rows] = part
                continue
            pieces = part.split([span.stop - span.start for span in spans], dim=2)
            for span, piece in zip(spans, pieces, strict=True):
                grad[:, :, span] += piece
    return grads


def _gathered(tensor: Tensor, block: Block) -> Tensor:
    parts = [tensor[:, :, span] for span in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both, in the dtype of `lse`:

    lse = log(e^lse_1 + e^lse_2)    out = e^(lse_1 - lse) out_1 + e^(lse_2 - lse) out_2
    """
    total = torch.logaddexp(lse, other_lse)
    own_share, other_share = ((each - total).exp().unsqueeze(-1) for each in (lse, other_lse))
    return (out * own_share + other * other_share).to(out.dtype), total
