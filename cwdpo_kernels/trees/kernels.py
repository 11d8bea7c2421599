"""Attention of one rectangle, in two implementations with the same signature.

    out [B, H, n, E], lse [B, H, n] = forward(query [B, H, n, D], key [B, G, m, D], value [B, G, m, E], rectangle)

with H a multiple of G, and lse the log of the sum of the exponentiated scores, in nats. `backward` gets the `out` and
`lse` of all keys that a query sees, not only those of the rectangle, so its gradients are the rectangle's share:

    p = exp(score - lse)    grad_value = p^T grad_out    grad_score = p * (grad_out value^T - sum(grad_out * out))

- `flash_cpu`: torch's flash attention for CPUs. It has no soft cap.
- `math`: plain torch ops on any device, in blocks of rows. It also serves float32 on a GPU and heads whose values have
  another width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten
SCORES = 2**22  # elements of a block of scores in `math`


class Rectangle(NamedTuple):
    """What a kernel needs to know of a rectangle: see `blocks.Block`."""

    causal: bool
    mask: Tensor | None
    scale: float
    softcap: float | None


def flash_cpu_forward(query: Tensor, key: Tensor, value: Tensor, what: Rectangle) -> tuple[Tensor, Tensor]:
    query, key, value = map(_with_dense_rows, (query, key, value))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, what.causal, attn_mask=what.mask, scale=what.scale
    )
    # torch takes a row whose scores are all NaN for a masked one, and returns zeros. One element of `out` tells.
    lost = (lse == 0) & (out[..., 0] == 0) & _sees_bad(query, key, what)
    return out.masked_fill_(lost.unsqueeze(-1), torch.nan), lse.masked_fill_(lost, torch.nan)


def _sees_bad(query: Tensor, key: Tensor, what: Rectangle) -> Tensor:
    """Which rows [B, H, n] have NaN or inf in their query or in a key that they see."""
    bad = ~torch.isfinite(key.sum(-1))  # [B, G, m]
    if what.causal:
        seen = bad.cumsum(-1) > 0
    elif what.mask is not None:
        seen = (bad.unsqueeze(-2) & (what.mask == 0)).any(-1)
    else:
        seen = bad.any(-1, keepdim=True)
    return _repeated(seen, query.shape[1]) | ~torch.isfinite(query.sum(-1))


def flash_cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, what: Rectangle
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, query, key, value = map(_with_dense_rows, (grad_out, query, key, value))
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, what.causal, attn_mask=what.mask, scale=what.scale
    )


def math_forward(query: Tensor, key: Tensor, value: Tensor, what: Rectangle) -> tuple[Tensor, Tensor]:
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=accumulator(query.dtype))
    for rows in _row_blocks(query, key):
        score, _ = _scores(query, key, rows, what)
        lse[:, :, rows] = torch.logsumexp(score, -1)
        out[:, :, rows] = (score - lse[:, :, rows, None]).exp().to(value.dtype) @ value
    return out, lse


def math_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, what: Rectangle
) -> tuple[Tensor, Tensor, Tensor]:
    groups, dtype = key.shape[1], accumulator(query.dtype)
    key, value = (_repeated(each, query.shape[1]) for each in (key, value))
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(each, dtype=dtype) for each in (key, value))
    for rows in _row_blocks(query, key):
        score, slope = _scores(query, key, rows, what)
        p = (score - lse[:, :, rows, None]).exp()
        grad = grad_out[:, :, rows].to(dtype)
        grad_value += p.transpose(-1, -2) @ grad
        delta = (grad * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
        grad_score = p * (grad @ value.to(dtype).transpose(-1, -2) - delta) * what.scale
        if slope is not None:
            grad_score *= slope
        grad_query[:, :, rows] = (grad_score @ key.to(dtype)).to(query.dtype)
        grad_key += grad_score.transpose(-1, -2) @ query[:, :, rows].to(dtype)
    return grad_query, _summed(grad_key, groups).to(query.dtype), _summed(grad_value, groups).to(query.dtype)


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The flash kernels read the last dimension as if it were contiguous, whatever its stride is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores and log-sum-exps have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeated(heads: Tensor, count: int) -> Tensor:
    return heads.repeat_interleave(count // heads.shape[1], dim=1)


def _summed(heads: Tensor, groups: int) -> Tensor:
    return heads.unflatten(1, (groups, -1)).sum(2)


def _row_blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    return (slice(start, min(start + size, query.shape[2])) for start in range(0, query.shape[2], size))


def _scores(query: Tensor, key: Tensor, rows: slice, what: Rectangle) -> tuple[Tensor, Tensor | None]:
    """The scores of some rows, at least in float32, and the derivative of the soft cap (None without one)."""
    dtype, slope = accumulator(query.dtype), None
    score = query[:, :, rows].to(dtype) @ key.to(dtype).transpose(-1, -2) * what.scale
    if what.softcap is not None:
        share = torch.tanh(score / what.softcap)
        score, slope = what.softcap * share, 1 - share * share
    if what.mask is not None:
        score = score + what.mask[rows].to(dtype)
    if what.causal:
        later = torch.arange(key.shape[2], device=key.device) > torch.arange(
            rows.start, rows.stop, device=key.device
        ).unsqueeze(-1)
        score = score.masked_fill(later, -torch.inf)
    return score, slope
