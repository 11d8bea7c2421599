r"""The method: log-probabilities of labels under a linear head, without the logits, and their exact gradient.

Compare the label with its competitors. With z the logits of a token, y its label and c = z_y (a dot product),

    s = sum_{v != y} exp(z_v - c)              the odds against the label
    logp = -log1p(s)         1 - p_y = s / (1 + s)

Neither formula subtracts nearly equal numbers, however confident the token. s itself can overflow if the label is very
unlikely, so the vocabulary tiles accumulate the competitors' running maximum and sum instead:

    anchor = max_{v != y} z_v        sum_exp = sum_{v != y} exp(z_v - anchor)        log s = (anchor - c) + log(sum_exp)

logp = -softplus(log s) is then exact for any finite logits, and a competitor at -inf has probability and gradient 0.
(Computing z_v - c first rounds each term once more: with the label 200 nats below the top logit, the head's gradient
was 30 times less accurate.)

The gradient depends on the competitors only through their own softmax, which sums to one over v != y:

    q_v = exp(z_v - anchor) / sum_exp

    d logp / d z_v = (1 - p_y) * (1 if v == y else -q_v)
    d logp / d h   = (1 - p_y) * scale * (W_y - sum_{v != y} q_v W_v)

With a soft cap, each term is also multiplied by its slope 1 - (z / cap)^2.

Costs, in units of 2 N D V floating-point operations:
- no gradient: 1.
- frozen head: 2, all in forward, which accumulates the direction W_y - sum q W beside s. Backward scales its rows.
- trainable head: 1 in forward and 3 in backward, which recomputes the tiles that were not kept (2 if all were).
Memory: one tile (workspace_bytes), the kept tiles, and N x D. Forward processes only labelled rows, and backward only
those of them that have a gradient.

Tiles kept in the memory of the head's gradient need no memory of their own: backward writes the gradient tile by tile
from the start, and reads each kept tile before it overwrites it. With N <= D tokens all tiles but the last fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import LogitGrads, head_gradients
from .kept import KeptTiles
from .tiles import TiledHead, compute_dtype, fill_target, new_direction, rows_where


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, with_direction: bool, sparse_grad: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp [N], anchor [N], sum_exp [N], direction [N, D] (or empty), kept tiles (opaque bytes or [V, D])."""
    dtype = compute_dtype(hidden.dtype)
    logp = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
    anchor, sum_exp = torch.zeros_like(logp), torch.zeros_like(logp)
    direction = new_direction(hidden, with_direction)
    opaque = kept_bytes is not None and kept_bytes >= 0
    kept = hidden.new_empty(kept_bytes or 0, dtype=torch.uint8) if opaque else torch.empty_like(weight)

    rows = rows_where(labels != ignore_index)
    labels_N = labels[rows].long()
    head = TiledHead(hidden[rows], weight, bias, scale, softcap, workspace_bytes)
    target_N = head.target_logits(labels_N)
    kept_tiles = KeptTiles(kept, head)
    if kept_bytes is None or kept_bytes >= 0:
        kept_tiles.zero_unused()
    anchor_N, sum_exp_N, direction_ND = _forward(head, labels_N, target_N, with_direction, kept_tiles)
    logp[rows], anchor[rows], sum_exp[rows] = logp_of(target_N, anchor_N, sum_exp_N), anchor_N, sum_exp_N
    if direction_ND is not None:
        direction[rows] = direction_ND.to(direction.dtype)
    return logp, anchor, sum_exp, direction, kept


def logp_of(target_N: Tensor, anchor_N: Tensor, sum_exp_N: Tensor) -> Tensor:
    """-log1p(s) = -softplus(log s). NaN if a logit is NaN or +inf, or if all are -inf."""
    log_odds_N = (anchor_N - target_N) + torch.log(sum_exp_N)
    logp_N = -torch.logaddexp(log_odds_N, torch.zeros_like(log_odds_N))
    return logp_N.masked_fill(target_N == torch.inf, torch.nan)


def exp_factor_of(grad_target: Tensor, sum_exp: Tensor) -> Tensor:
    """The gradient of a competitor's logit is this times exp(z_v - anchor).

    Without competitors (V = 1, or all of them at -inf) it is 0, and so is the label's gradient.
    """
    return torch.where(grad_target == 0, 0.0, -grad_target / sum_exp)


def _forward(
    head: TiledHead, labels_N: Tensor, target_N: Tensor, with_direction: bool, kept: KeptTiles
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over the vocabulary: anchor [N], sum_exp [N] and, with_direction, scale * (W_y - sum q W) [N, D]."""
    anchor_N = torch.full_like(target_N, torch.finfo(head.dtype).min)
    sum_exp_N = torch.zeros_like(target_N)
    sum_exp_weight_ND = target_N.new_zeros(head.hidden.shape) if with_direction else None

    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        for rows in head.rows():
            tile_RB = head.logits(rows, columns, weight_BD)
            kept.save(tile_RB, rows, columns)
            slope_RB = head.slope(tile_RB) if with_direction else None

            fill_target(tile_RB, labels_N[rows], columns, -torch.inf)
            anchor_R = torch.maximum(anchor_N[rows], tile_RB.amax(1))
            decay_R = torch.exp(anchor_N[rows] - anchor_R)
            anchor_N[rows] = anchor_R
            tile_RB.sub_(anchor_R[:, None]).exp_()
            sum_exp_N[rows] = sum_exp_N[rows] * decay_R + tile_RB.sum(1)
            if sum_exp_weight_ND is not None:
                if slope_RB is not None:
                    tile_RB.mul_(slope_RB)
                sum_exp_weight_ND[rows].mul_(decay_R[:, None]).addmm_(tile_RB, weight_BD)

    if sum_exp_weight_ND is not None:
        to_direction(head, labels_N, target_N, anchor_N, sum_exp_N, sum_exp_weight_ND)
    return anchor_N, sum_exp_N, sum_exp_weight_ND


def to_direction(
    head: TiledHead, labels_N: Tensor, target_N: Tensor, anchor_N: Tensor, sum_exp_N: Tensor, sum_exp_weight_ND: Tensor
) -> None:
    """The direction scale * (slope_y W_y - sum q W), from sum exp(z_v - anchor) slope_v W_v, in place.

    0 where logp is NaN: an upstream gradient of 0 then gives 0, and any other NaN, because 1 - p_y is NaN.
    """
    # Without competitors (V = 1) sum_exp is 0. The clamp avoids 0 / 0; backward multiplies by 1 - p_y = 0.
    sum_exp_weight_ND.div_(sum_exp_N.clamp_min(torch.finfo(head.dtype).tiny)[:, None])
    slope_N = head.slope(target_N)
    for rows in head.rows():
        target_RD = head.target_weight(rows, labels_N[rows])
        if slope_N is not None:
            target_RD = target_RD * slope_N[rows, None]
        sum_exp_weight_ND[rows].neg_().add_(target_RD).mul_(head.scale)
    sum_exp_weight_ND.masked_fill_(torch.isnan(logp_of(target_N, anchor_N, sum_exp_N))[:, None], 0.0)


def linear_logprob_backward(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V] for a trainable head; empty where not needed.

    Rows without an upstream gradient are always skipped, so `sparse_grad` is not read. The weight's gradient is written
    to `grad_weight` if that is given.
    """
    grad_target = grad_logp.to(logp.dtype) * -torch.expm1(logp) * scale  # 1 - p_y = -expm1(logp)
    # The log-prob of a token without an upstream gradient may be NaN.
    grad_target = torch.where(grad_logp == 0, 0.0, grad_target)
    grads = LogitGrads(labels, labels != ignore_index, anchor, grad_target, exp_factor_of(grad_target, sum_exp))
    return head_gradients(
        hidden, weight, bias, grads, kept, scale, softcap, needs_hidden, needs_weight, needs_bias, workspace_bytes,
        grad_weight,
    )  # fmt: skip


def linear_logprob_backward_(
    grad_logp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logp: Tensor,
    anchor: Tensor, sum_exp: Tensor, kept: Tensor, scale: float, softcap: float | None, ignore_index: int,
    needs_hidden: bool, needs_bias: bool, sparse_grad: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and bias; the weight's gradient overwrites `kept` [V, D], whose memory holds the tiles."""
    grad_hidden, _, grad_bias = linear_logprob_backward(
        grad_logp, hidden, weight, bias, labels, logp, anchor, sum_exp, kept, scale, softcap, ignore_index,
        needs_hidden, True, needs_bias, sparse_grad, workspace_bytes, grad_weight=kept,
    )  # fmt: skip
    return grad_hidden, grad_bias
