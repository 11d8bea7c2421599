"""Attention of one rectangle, in two implementations with the same signature.

    out [B, H, n, E], lse [B, H, n] = forward(query [B, H, n, D], key [B, G, m, D], value [B, G, m, E], rectangle)

with H a multiple of G, and lse the log of the sum of the exponentiated scores, in nats. `backward` gets the merged
`out` and `lse` over all keys that a query sees, also those outside the rectangle. So its gradients are the rectangle's
share of the whole gradients, with the shapes of query, key and value:

    p = exp(score - lse)    grad_value = p^T grad_out    grad_score = p * (grad_out value^T - sum(grad_out * out))

- `flash_cpu`: torch's flash attention for CPUs. It has no soft cap.
- `math`: plain torch ops on any device, in blocks of rows. It computes what the faster kernels cannot: float32 on a
  GPU, soft caps, values of another width than keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten
MAX_SCORES = 2**22  # `math` computes at most this many scores at once, or one row


class Rectangle(NamedTuple):
    """The options of a kernel for one rectangle. For `causal` and `mask` see `blocks.Block`."""

    causal: bool
    mask: Tensor | None
    scale: float
    softcap: float | None


def flash_cpu_forward(query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle) -> tuple[Tensor, Tensor]:
    query, key, value = map(_with_dense_rows, (query, key, value))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, rectangle.causal, attn_mask=rectangle.mask, scale=rectangle.scale
    )
    # torch treats a row of NaN scores as fully masked: it returns out 0 and lse 0. To find such rows, one element of
    # `out` is enough.
    lost = (lse == 0) & (out[..., 0] == 0) & _sees_nonfinite(query, key, rectangle)
    return out.masked_fill_(lost.unsqueeze(-1), torch.nan), lse.masked_fill_(lost, torch.nan)


def _sees_nonfinite(query: Tensor, key: Tensor, rectangle: Rectangle) -> Tensor:
    """Whether the query of each row, or a key that it sees, has NaN or inf: [B, H, n]."""
    bad = ~torch.isfinite(key.sum(-1))  # [B, G, m]
    if rectangle.causal:
        seen = bad.cumsum(-1) > 0
    elif rectangle.mask is not None:
        seen = (bad.unsqueeze(-2) & (rectangle.mask == 0)).any(-1)
    else:
        seen = bad.any(-1, keepdim=True)
    return _repeated(seen, query.shape[1]) | ~torch.isfinite(query.sum(-1))


def flash_cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rectangle: Rectangle
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, query, key, value = map(_with_dense_rows, (grad_out, query, key, value))
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, rectangle.causal, attn_mask=rectangle.mask, scale=rectangle.scale
    )


def math_forward(query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle) -> tuple[Tensor, Tensor]:
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    for rows in _row_blocks(query, key):
        score, _ = _scores(query, key, rows, rectangle)
        lse[:, :, rows] = torch.logsumexp(score, -1)
        out[:, :, rows] = (score - lse[:, :, rows, None]).exp().to(value.dtype) @ value
    return out, lse


def math_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rectangle: Rectangle
) -> tuple[Tensor, Tensor, Tensor]:
    groups, dtype = key.shape[1], accumulator(query.dtype)
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(each, dtype=dtype) for each in (key, value))
    for rows in _row_blocks(query, key):
        score, slope = _scores(query, key, rows, rectangle)
        p = (score - lse[:, :, rows, None]).exp()
        grad = grad_out[:, :, rows].to(dtype)
        grad_value += p.transpose(-1, -2) @ grad
        delta = (grad * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
        grad_score = p * (grad @ value.to(dtype).transpose(-1, -2) - delta) * rectangle.scale
        if slope is not None:
            grad_score *= slope
        grad_query[:, :, rows] = (grad_score @ key.to(dtype)).to(query.dtype)
        grad_key += grad_score.transpose(-1, -2) @ query[:, :, rows].to(dtype)
    return grad_query, _summed(grad_key, groups).to(query.dtype), _summed(grad_value, groups).to(query.dtype)


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` with stride 1 in the last dimension, because the flash kernels ignore that stride."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and log-sum-exps: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeated(heads: Tensor, count: int) -> Tensor:
    return heads.repeat_interleave(count // heads.shape[1], dim=1)


def _summed(heads: Tensor, groups: int) -> Tensor:
    return heads.unflatten(1, (groups, -1)).sum(2)


def _row_blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    return (slice(start, min(start + size, query.shape[2])) for start in range(0, query.shape[2], size))


def _scores(query: Tensor, key: Tensor, rows: slice, rectangle: Rectangle) -> tuple[Tensor, Tensor | None]:
    """The scores [B, H, r, m] of r `rows`, in float32 or float64, and the derivative of the soft cap at each (None
    without a soft cap)."""
    dtype, slope = accumulator(query.dtype), None
    score = query[:, :, rows].to(dtype) @ key.to(dtype).transpose(-1, -2) * rectangle.scale
    if rectangle.softcap is not None:
        share = torch.tanh(score / rectangle.softcap)
        score, slope = rectangle.softcap * share, 1 - share * share
    if rectangle.mask is not None:
        score = score + rectangle.mask[rows].to(dtype)
    if rectangle.causal:
        later = torch.arange(key.shape[2], device=key.device) > torch.arange(
            rows.start, rows.stop, device=key.device
        ).unsqueeze(-1)
        score = score.masked_fill(later, -torch.inf)
    return score, slope
