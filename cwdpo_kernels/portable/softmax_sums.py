r"""What the softmax of a head needs of each token: sums over the vocabulary, in one pass, without the logits.

With z the logits of a token, y its label, and sums over the competitors v != y but for the last,

    target = z_y               max_logit = max z_v            sum_exp = sum u_v,   u_v = exp(z_v - max_logit)
    moment = sum u_v log u_v   sum_sq = sum u_v^2             sum_logit = sum of all z_v, label included

The gradients of sum_exp and moment treat max_logit as a constant: what is computed of them does not depend on it.

A head may be one part of a vocabulary that other processes hold the rest of (`partial`). Labels outside [0, V) then
belong to another part: all entries are competitors, and target is 0.

A frozen head can take the direction of linear_logprob along (`with_direction`), for one more product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import NEGLIGIBLE, LogitGrads, head_gradients
from .kept import KeptTiles
from .linear_logprob import to_direction
from .tiles import TiledHead, compute_dtype, fill_target, new_direction, rows_where

SUMS = ("target", "max_logit", "sum_exp", "moment", "sum_sq", "sum_logit")


def softmax_sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, partial: bool, with_direction: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums [6, N], 0 where ignored, direction [N, D] (or empty) and the kept tiles (opaque bytes or [V, D])."""
    opaque = kept_bytes is not None and kept_bytes >= 0
    kept = hidden.new_empty(kept_bytes or 0, dtype=torch.uint8) if opaque else torch.empty_like(weight)
    rows = rows_where(labels != ignore_index)
    head = TiledHead(hidden[rows], weight, bias, scale, softcap, workspace_bytes)
    kept_tiles = KeptTiles(kept, head)
    if kept_bytes is None or kept_bytes >= 0:
        kept_tiles.zero_unused()
    sums = torch.zeros(len(SUMS), labels.numel(), dtype=compute_dtype(hidden.dtype), device=hidden.device)
    direction = new_direction(hidden, with_direction)
    sums[:, rows], direction_ND = _accumulate(head, labels[rows].long(), partial, with_direction, kept_tiles)
    if direction_ND is not None:
        direction[rows] = direction_ND.to(direction.dtype)
    return sums, direction, kept


def _accumulate(
    head: TiledHead, labels_N: Tensor, partial: bool, with_direction: bool, kept: KeptTiles
) -> tuple[Tensor, Tensor | None]:
    sums_SN = torch.zeros(len(SUMS), labels_N.numel(), dtype=head.dtype, device=labels_N.device)
    target_N, max_logit_N, sum_exp_N, moment_N, sum_sq_N, sum_logit_N = sums_SN
    inside_N = (labels_N >= 0) & (labels_N < head.weight.shape[0])
    target_N.copy_(head.target_logits(labels_N.clamp(0, head.weight.shape[0] - 1) if partial else labels_N))
    if partial:
        target_N.masked_fill_(~inside_N, 0.0)
    max_logit_N.fill_(torch.finfo(head.dtype).min)
    sum_exp_weight_ND = target_N.new_zeros(head.hidden.shape) if with_direction else None
    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        for rows in head.rows():
            tile_RB = head.logits(rows, columns, weight_BD)
            kept.save(tile_RB, rows, columns)
            slope_RB = head.slope(tile_RB) if with_direction else None
            sum_logit_N[rows] += tile_RB.sum(1)
            fill_target(tile_RB, labels_N[rows], columns, -torch.inf)
            max_logit_R = torch.maximum(max_logit_N[rows], tile_RB.amax(1))
            shift_R = (max_logit_N[rows] - max_logit_R).clamp_min_(-NEGLIGIBLE)
            decay_R = torch.exp(shift_R)
            max_logit_N[rows] = max_logit_R
            tile_RB.sub_(max_logit_R[:, None]).clamp_min_(-NEGLIGIBLE)
            u_RB = torch.exp(tile_RB)
            moment_N[rows] = (moment_N[rows] + shift_R * sum_exp_N[rows]) * decay_R + (u_RB * tile_RB).sum(1)
            sum_exp_N[rows] = sum_exp_N[rows] * decay_R + u_RB.sum(1)
            sum_sq_N[rows] = sum_sq_N[rows] * decay_R.square() + torch.linalg.vecdot(u_RB, u_RB)
            if sum_exp_weight_ND is not None:
                if slope_RB is not None:
                    u_RB.mul_(slope_RB)
                sum_exp_weight_ND[rows].mul_(decay_R[:, None]).addmm_(u_RB, weight_BD)
    if sum_exp_weight_ND is not None:
        to_direction(head, labels_N, target_N, max_logit_N, sum_exp_N, sum_exp_weight_ND)
    return sums_SN, sum_exp_weight_ND


def softmax_sums_backward(
    grad_target: Tensor, exp_factor: Tensor, log_factor: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, max_logit: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    partial: bool, needs_hidden: bool, needs_weight: bool, needs_bias: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, from those of the logits as gradients.py gives them, with u_v as above.

    The three numbers are of unscaled logits: the caller multiplies them by `scale`.
    """
    labelled = labels != ignore_index
    grads = LogitGrads(labels, labelled, max_logit, grad_target, exp_factor, log_factor)
    return head_gradients(
        hidden, weight, bias, grads, kept, scale, softcap, needs_hidden, needs_weight, needs_bias, workspace_bytes,
        grad_weight,
    )  # fmt: skip


def softmax_sums_backward_(
    grad_target: Tensor, exp_factor: Tensor, log_factor: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, max_logit: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    partial: bool, needs_hidden: bool, needs_bias: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and bias; the weight's gradient overwrites `kept` [V, D], whose memory holds the tiles."""
    grad_hidden, _, grad_bias = softmax_sums_backward(
        grad_target, exp_factor, log_factor, hidden, weight, bias, labels, max_logit, kept, scale, softcap,
        ignore_index, partial, needs_hidden, True, needs_bias, workspace_bytes, grad_weight=kept,
    )  # fmt: skip
    return grad_hidden, grad_bias
