"""Entropy, top-1 probability and top-1 correctness with the label's log-probability, in one pass, without logits.

The pass accumulates the competitors' (anchor, sum_exp) of linear_logprob and moment = sum exp(z_v - anchor)
(z_v - anchor). Then the label's own logit c joins in, with m = max(anchor, c) and Z = sum_v exp(z_v - m) over all v:

    entropy = log Z - (1 / Z) sum_v exp(z_v - m) (z_v - m)       top-1 probability = 1 / Z
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_logprob import logp_of
from .tiles import TiledHead, compute_dtype, fill_target, rows_where

# nats: exp(-NEGLIGIBLE) is 0 in every dtype. Distances are cut off here, because 0 * -inf would make a moment NaN.
NEGLIGIBLE = 1e3


def token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp, entropy, top-1 probability [N] and whether the label is top-1 (bool [N]); 0 where ignored."""
    dtype = compute_dtype(hidden.dtype)
    logp, entropy, top1_prob = (torch.zeros(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    is_top1 = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)

    rows = rows_where(labels != ignore_index)
    head = TiledHead(hidden[rows], weight, bias, scale, softcap, workspace_bytes)
    labels_N = labels[rows].long()
    target_N = head.target_logits(labels_N)
    anchor_N, sum_exp_N, moment_N = _accumulate(head, labels_N)

    logp[rows] = logp_of(target_N, anchor_N, sum_exp_N)
    lead_N = anchor_N - target_N  # of the best competitor over the label
    top_N = lead_N.clamp_min(0)  # of the top token over the label
    # Z - 1, the weight of all but the top token: log1p of it keeps its digits when Z is close to 1.
    rest_N = torch.where(lead_N > 0, (sum_exp_N - 1) + torch.exp(-top_N), torch.exp(lead_N.clamp_max(0)) * sum_exp_N)
    below_N = lead_N.clamp_max(0)  # of the best competitor under the top token
    others_N = torch.exp(below_N) * (moment_N + below_N * sum_exp_N)
    shifted_N = others_N - torch.exp(-top_N) * top_N.clamp_max(NEGLIGIBLE)
    broken_N = torch.isnan(logp[rows])
    entropy[rows] = (torch.log1p(rest_N) - shifted_N / (1 + rest_N)).clamp_min(0).masked_fill(broken_N, torch.nan)
    top1_prob[rows] = (1 / (1 + rest_N)).masked_fill(broken_N, torch.nan)
    is_top1[rows] = (lead_N <= 0) & ~broken_N
    return logp, entropy, top1_prob, is_top1


def _accumulate(head: TiledHead, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    anchor_N = labels_N.new_full(labels_N.shape, torch.finfo(head.dtype).min, dtype=head.dtype)
    sum_exp_N, moment_N = torch.zeros_like(anchor_N), torch.zeros_like(anchor_N)
    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        for rows in head.rows():
            tile_RB = head.logits(rows, columns, weight_BD)
            fill_target(tile_RB, labels_N[rows], columns, -torch.inf)
            anchor_R = torch.maximum(anchor_N[rows], tile_RB.amax(1))
            shift_R = (anchor_N[rows] - anchor_R).clamp_min_(-NEGLIGIBLE)
            decay_R = torch.exp(shift_R)
            anchor_N[rows] = anchor_R
            tile_RB.sub_(anchor_R[:, None]).clamp_min_(-NEGLIGIBLE)
            weight_RB = torch.exp(tile_RB)
            moment_N[rows] = (moment_N[rows] + shift_R * sum_exp_N[rows]) * decay_R + (weight_RB * tile_RB).sum(1)
            sum_exp_N[rows] = sum_exp_N[rows] * decay_R + weight_RB.sum(1)
    return anchor_N, sum_exp_N, moment_N
