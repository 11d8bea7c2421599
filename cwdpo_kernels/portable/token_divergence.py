"""TV, JS and KL between the next-token distributions of two heads, in two passes over the vocabulary, without logits.

The first pass computes both log-normalizers. The second accumulates per token, from one tile of p and q at a time:

    tv = 1/2 sum |p - q|        kl = sum p (log p - log q)        js = 1/2 KL(p || m) + 1/2 KL(q || m),  m = (p + q) / 2

p, q and m each sum to one, so KL(p || q) = sum [p (log p - log q) - p + q]. Every term is >= 0, so nothing cancels
when p and q are close.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import WORKSPACE_BYTES
from .tiles import TiledHead


def token_divergence(
    hidden_p: Tensor, weight_p: Tensor, bias_p: Tensor | None, scale_p: float, softcap_p: float | None,
    hidden_q: Tensor, weight_q: Tensor, bias_q: Tensor | None, scale_q: float, softcap_q: float | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """tv, js, kl [N]."""
    half = (workspace_bytes or WORKSPACE_BYTES) // 2
    head_p = TiledHead(hidden_p, weight_p, bias_p, scale_p, softcap_p, half)
    head_q = TiledHead(hidden_q, weight_q, bias_q, scale_q, softcap_q, half)
    # Both heads use the same tiles: the narrower ones of the two, which fit both buffers.
    head_p.tile_columns = head_q.tile_columns = min(head_p.tile_columns, head_q.tile_columns)
    norm_p_N, norm_q_N = _log_normalizer(head_p), _log_normalizer(head_q)

    tv_N, js_N, kl_N = torch.zeros_like(norm_p_N), torch.zeros_like(norm_p_N), torch.zeros_like(norm_p_N)
    for columns in head_p.columns():
        weight_p_BD, weight_q_BD = head_p.weight_tile(columns), head_q.weight_tile(columns)
        for rows in head_p.rows():
            log_p = head_p.logits(rows, columns, weight_p_BD).sub_(norm_p_N[rows, None])
            log_q = head_q.logits(rows, columns, weight_q_BD).sub_(norm_q_N[rows, None])
            p, q = log_p.exp(), log_q.exp()
            log_m, m = torch.logaddexp(log_p, log_q).sub_(math.log(2)), (p + q).mul_(0.5)
            tv_N[rows] += (p - q).abs_().sum(1) / 2
            kl_N[rows] += _kl_terms(p, log_p, q, log_q).sum(1)
            js_N[rows] += (_kl_terms(p, log_p, m, log_m) + _kl_terms(q, log_q, m, log_m)).sum(1) / 2
    return tv_N, js_N.clamp_min_(0), kl_N.clamp_min_(0)


def _kl_terms(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) - p + q >= 0, and q where p = 0, because 0 log 0 = 0.

    Near d = log p - log q = 0, p (d + expm1(-d)) avoids the difference q - p.
    """
    d = log_p - log_q
    terms = torch.where(d > -1, p * (d + torch.expm1(-d)), p * d + (q - p))
    return torch.where(p == 0, q, terms)


def _log_normalizer(head: TiledHead) -> Tensor:
    """log sum_v exp(z_v) [N]."""
    rows_total = head.hidden.shape[0]
    anchor_N = torch.full((rows_total,), torch.finfo(head.dtype).min, dtype=head.dtype, device=head.hidden.device)
    sum_exp_N = torch.zeros_like(anchor_N)
    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        for rows in head.rows():
            tile_RB = head.logits(rows, columns, weight_BD)
            anchor_R = torch.maximum(anchor_N[rows], tile_RB.amax(1))
            decay_R = torch.exp(anchor_N[rows] - anchor_R)
            sum_exp_N[rows] = sum_exp_N[rows] * decay_R + tile_RB.sub_(anchor_R[:, None]).exp_().sum(1)
            anchor_N[rows] = anchor_R
    return anchor_N + torch.log(sum_exp_N)
