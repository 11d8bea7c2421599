"""Entropy, top-1 probability and top-1 correctness beside the label's log-probability, in one sweep, no logits.

The competitors' (peak, total) of linear_logprob are joined by moment = sum exp(z_v - peak) (z_v - peak). With the
label's own logit c back in and m = max(peak, c), Z = sum_v exp(z_v - m):

    entropy = log Z - (1 / Z) sum_v exp(z_v - m) (z_v - m)       top-1 probability = 1 / Z
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_logprob import logp_of
from .tiles import TiledHead, compute_dtype, fill_target, live_rows


def token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp, entropy, top-1 probability [N] and whether the label is the top-1 (bool [N]); 0 where ignored."""
    dtype = compute_dtype(hidden.dtype)
    logp, entropy, top1_prob = (torch.zeros(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    is_top1 = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)

    rows = live_rows(labels != ignore_index)
    head = TiledHead(hidden[rows], weight, bias, scale, softcap, workspace_bytes)
    labels_N = labels[rows].long()
    target_N = head.target_logits(labels_N)
    peak_N, total_N, moment_N = _sweep(head, labels_N)

    logp[rows] = logp_of(target_N, peak_N, total_N)
    lead_N = peak_N - target_N  # of the best competitor over the label
    top_N = lead_N.clamp_min(0)  # of the top token over the label
    # Z - 1, the weight of everything but the top token, so that log Z keeps its digits when Z is close to 1.
    rest_N = torch.where(lead_N > 0, (total_N - 1) + torch.exp(-top_N), torch.exp(lead_N - top_N) * total_N)
    shifted_N = torch.exp(lead_N - top_N) * (moment_N + (lead_N - top_N) * total_N) - torch.exp(-top_N) * top_N
    entropy[rows] = (torch.log1p(rest_N) - shifted_N / (1 + rest_N)).clamp_min(0)
    top1_prob[rows] = 1 / (1 + rest_N)
    is_top1[rows] = lead_N <= 0
    return logp, entropy, top1_prob, is_top1


def _sweep(head: TiledHead, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    peak_N = labels_N.new_full(labels_N.shape, torch.finfo(head.dtype).min, dtype=head.dtype)
    total_N, moment_N = torch.zeros_like(peak_N), torch.zeros_like(peak_N)
    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        for rows in head.rows():
            tile_RB = head.logits(rows, columns, weight_BD)
            # A finite stand-in for -inf: its weight is 0, and 0 * -inf would be NaN in the moment.
            fill_target(tile_RB, labels_N[rows], columns, torch.finfo(head.dtype).min / 2)
            peak_R = torch.maximum(peak_N[rows], tile_RB.amax(1))
            shift_R = peak_N[rows] - peak_R
            decay_R = torch.exp(shift_R)
            peak_N[rows] = peak_R
            tile_RB.sub_(peak_R[:, None])
            weight_RB = torch.exp(tile_RB)
            moment_N[rows] = (moment_N[rows] + shift_R * total_N[rows]) * decay_R + (weight_RB * tile_RB).sum(1)
            total_N[rows] = total_N[rows] * decay_R + weight_RB.sum(1)
    return peak_N, total_N, moment_N
