"""token_divergence on a GPU: one sweep per head for its normaliser, then one pass over the tiles of both heads.

portable/token_divergence.py states the formulas. 2 (D_p + D_q) N V multiply-adds. Bytes moved: the operands, twice, and
partial sums, written and read: 16 N T for each sweep, whose tiles are wider, and 24 N T for the last pass.
Legend: N tokens, D hidden, V vocabulary, T vocabulary tiles; p and q are the two heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import empty_sums, merge_tiles
from .configs import COMPILER_OPTIONS, grid, tile_config
from .primitives import LN2_HI, LN2_LO, logits_tile, tile_position
from .sweep import Sweep, tile_arguments

NO_LABEL = -1  # in no tile, so the sweep sums over the whole vocabulary


@triton.jit
def _kl_term(p, log_p, q, log_q):
    """p (log p - log q) - p + q >= 0, and q where p = 0. A series of p (d + expm1(-d)) for small d = log p - log q."""
    d = log_p - log_q
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d * (1 / 5040 - d / 40320))))))
    return tl.where(p == 0, q, tl.where(tl.abs(d) < 0.5, p * series, p * d + (q - p)))


@triton.jit
def _log_prob(z, anchor_ptr, sum_exp_ptr, offs_n, mask_n):
    """Log-probs of a tile of logits, given the (anchor, sum_exp) of the whole vocabulary."""
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
    sum_exp = tl.load(sum_exp_ptr + offs_n, mask=mask_n, other=1.0)
    return (z - (anchor * LN2_HI)[:, None]) - (tl.log(sum_exp) + anchor * LN2_LO)[:, None]


@triton.jit
def _divergence_kernel(
    hidden_p, weight_p, bias_p_ptr, anchor_p_ptr, sum_exp_p_ptr, hidden_q, weight_q, bias_q_ptr, anchor_q_ptr,
    sum_exp_q_ptr, tv_ptr, js_ptr, kl_ptr, N, V, D_p, D_q,
    stride_hidden_p_n, stride_hidden_p_d, stride_weight_p_v, stride_weight_p_d,
    stride_hidden_q_n, stride_hidden_q_d, stride_weight_q_v, stride_weight_q_d,
    scale_p, softcap_p, scale_q, softcap_q, HAS_BIAS_P: tl.constexpr, HAS_BIAS_Q: tl.constexpr,
    HAS_SOFTCAP_P: tl.constexpr, HAS_SOFTCAP_Q: tl.constexpr, DESCRIPTORS_P: tl.constexpr,
    DESCRIPTORS_Q: tl.constexpr, PRECISION: tl.constexpr, FLATTEN: tl.constexpr, GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        pid_n, pid_v = tile_position(tile, tiles_n, tiles_v, GROUP_N)
        row, col = pid_n * BLOCK_N, pid_v * BLOCK_V
        offs_n = row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        z_p = logits_tile(
            hidden_p, weight_p, bias_p_ptr, row, col, N, V, D_p, stride_hidden_p_n, stride_hidden_p_d,
            stride_weight_p_v, stride_weight_p_d, scale_p, softcap_p, HAS_BIAS_P, HAS_SOFTCAP_P, PRECISION,
            DESCRIPTORS_P, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        log_p = _log_prob(z_p, anchor_p_ptr, sum_exp_p_ptr, offs_n, mask_n)
        z_q = logits_tile(
            hidden_q, weight_q, bias_q_ptr, row, col, N, V, D_q, stride_hidden_q_n, stride_hidden_q_d,
            stride_weight_q_v, stride_weight_q_d, scale_q, softcap_q, HAS_BIAS_Q, HAS_SOFTCAP_Q, PRECISION,
            DESCRIPTORS_Q, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        log_q = _log_prob(z_q, anchor_q_ptr, sum_exp_q_ptr, offs_n, mask_n)

        inside = (col + tl.arange(0, BLOCK_V) < V)[None, :]
        p = tl.where(inside, tl.exp(log_p), 0.0)
        q = tl.where(inside, tl.exp(log_q), 0.0)
        m = 0.5 * (p + q)
        # log m = max(log p, log q) + log((1 + exp(-gap)) / 2). log(m) would fail where m underflows.
        gap = tl.abs(log_p - log_q)
        log_m = tl.maximum(log_p, log_q) + tl.log(0.5 + 0.5 * tl.exp(-gap))
        js = _kl_term(p, log_p, m, log_m) + _kl_term(q, log_q, m, log_m)
        offs = pid_v.to(tl.int64) * N + offs_n
        tl.store(tv_ptr + offs, 0.5 * tl.sum(tl.abs(p - q), 1), mask=mask_n)
        tl.store(js_ptr + offs, 0.5 * tl.sum(js, 1), mask=mask_n)
        tl.store(kl_ptr + offs, tl.sum(_kl_term(p, log_p, q, log_q), 1), mask=mask_n)


def token_divergence(
    hidden_p: Tensor, weight_p: Tensor, bias_p: Tensor | None, scale_p: float, softcap_p: float | None,
    hidden_q: Tensor, weight_q: Tensor, bias_q: Tensor | None, scale_q: float, softcap_q: float | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """tv, js, kl [N]."""
    rows, vocab = hidden_p.shape[0], weight_p.shape[0]
    config = tile_config(hidden_p, softcap_p, softcap_q, column_divisor=4)  # a program holds two tiles of logits
    heads = (
        (hidden_p, weight_p, bias_p, scale_p, softcap_p),
        (hidden_q, weight_q, bias_q, scale_q, softcap_q),
    )
    arguments: dict[str, object] = {}
    for side, head in zip("pq", heads, strict=True):
        anchor, sum_exp = _normalizer(*head)
        # Without the multiplication by `scale`, the float32 kernel spills registers on sm_90.
        arguments |= _with_suffix(side, tile_arguments(*head, config) | {"scale": head[3]})
        arguments |= {f"anchor_{side}_ptr": anchor, f"sum_exp_{side}_ptr": sum_exp, f"D_{side}": head[0].shape[1]}
    tiles_v = triton.cdiv(vocab, config.block_v)
    tv, js, kl = (torch.empty(tiles_v, rows, dtype=torch.float32, device=hidden_p.device) for _ in range(3))
    if rows:
        tiles = triton.cdiv(rows, config.block_n) * tiles_v
        _divergence_kernel[grid(config, tiles, hidden_p.device)](
            **arguments, tv_ptr=tv, js_ptr=js, kl_ptr=kl, N=rows, V=vocab, **COMPILER_OPTIONS
        )
    return tv.sum(0), js.sum(0).clamp_min_(0), kl.sum(0).clamp_min_(0)


def _normalizer(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(anchor, sum_exp) [N] of the whole vocabulary: log sum_v exp(z_v) = anchor ln 2 + log(sum_exp)."""
    labels = torch.full((hidden.shape[0],), NO_LABEL, dtype=torch.int64, device=hidden.device)
    sweep = Sweep(hidden, weight, bias, labels, scale, softcap, ignore_index=NO_LABEL - 1, skip_ignored=False)
    sweep.run(range(sweep.tiles_v))
    anchor, sum_exp = empty_sums(sweep.rows, hidden.device)
    all_tiles = range(sweep.tiles_v)
    merge_tiles(sweep.anchor_TN, sweep.sum_exp_TN, all_tiles, anchor, sum_exp, labels, sweep.ignore_index)
    return anchor, sum_exp


def _with_suffix(side: str, arguments: dict) -> dict:
    """The kernel arguments of one head, renamed with the suffix p or q."""
    names = {"hidden": f"hidden_{side}", "weight": f"weight_{side}", "bias_ptr": f"bias_{side}_ptr"}
    names |= {name: f"{name}_{side}" for name in ("scale", "softcap")}
    names |= {name: f"{name}_{side.upper()}" for name in ("HAS_BIAS", "HAS_SOFTCAP", "DESCRIPTORS")}
    for matrix, axes in (("hidden", "nd"), ("weight", "vd")):
        names |= {f"stride_{matrix}_{axis}": f"stride_{matrix}_{side}_{axis}" for axis in axes}
    return {names.get(name, name): value for name, value in arguments.items()}
