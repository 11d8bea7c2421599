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

from .tiles import TiledHead, compute_dtype, direction_dtype, fill_target, rows_where


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, with_direction: bool, sparse_grad: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logp [N], anchor [N], sum_exp [N], direction [N, D] (or empty), kept tiles (opaque bytes or [V, D])."""
    dtype = compute_dtype(hidden.dtype)
    logp = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
    anchor, sum_exp = torch.zeros_like(logp), torch.zeros_like(logp)
    shape = hidden.shape if with_direction else (0, hidden.shape[1])
    direction = hidden.new_zeros(shape, dtype=direction_dtype(hidden.dtype))
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
        # Without competitors (V = 1) sum_exp is 0. The clamp avoids 0 / 0; backward multiplies by 1 - p_y = 0.
        sum_exp_weight_ND.div_(sum_exp_N.clamp_min(torch.finfo(head.dtype).tiny)[:, None])
        _to_direction(head, labels_N, target_N, sum_exp_weight_ND)
    return anchor_N, sum_exp_N, sum_exp_weight_ND


def _to_direction(head: TiledHead, labels_N: Tensor, target_N: Tensor, sum_exp_weight_ND: Tensor) -> None:
    """The direction scale * (slope_y W_y - sum q W), from sum q W, in place."""
    slope_N = head.slope(target_N)
    for rows in head.rows():
        target_RD = head.target_weight(rows, labels_N[rows])
        if slope_N is not None:
            target_RD = target_RD * slope_N[rows, None]
        sum_exp_weight_ND[rows].neg_().add_(target_RD).mul_(head.scale)


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
    dtype = compute_dtype(hidden.dtype)
    if grad_weight is None:
        grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    labelled = labels != ignore_index
    rows = rows_where(labelled & (grad_logp != 0))
    labels_N, anchor_N, sum_exp_N = labels[rows].long(), anchor[rows], sum_exp[rows]
    # Forward planned its tiles for all labelled rows. Use the same plan, so that kept tiles have the same boundaries.
    n_labelled = int(labelled.sum())
    head = TiledHead(hidden[rows], weight, bias, scale, softcap, workspace_bytes, max_rows=n_labelled)
    kept_tiles = KeptTiles(kept, head, n_labelled, selected=_positions(labelled, rows))
    grad_target_N = grad_logp[rows].to(dtype) * -torch.expm1(logp[rows]) * scale  # 1 - p_y = -expm1(logp)
    exp_factor_N = exp_factor_of(grad_target_N, sum_exp_N)
    grad_hidden_ND = grad_target_N.new_zeros(head.hidden.shape) if needs_hidden else None
    grad_bias = weight.new_empty(0) if bias is None or not needs_bias else torch.empty_like(bias)

    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        grad_weight_BD = _accumulator(grad_weight[columns], dtype) if needs_weight else None
        grad_bias_B = weight_BD.new_zeros(weight_BD.shape[0]) if needs_bias else None
        for block in head.rows():
            tile_RB = kept_tiles.load(block, columns)
            if tile_RB is None:
                tile_RB = head.logits(block, columns, weight_BD)
            slope_RB = head.slope(tile_RB)
            grad_RB = tile_RB.sub_(anchor_N[block, None]).exp_().mul_(exp_factor_N[block, None])
            # Replaces exp(c - anchor), which may overflow.
            fill_target(grad_RB, labels_N[block], columns, grad_target_N[block, None])
            if slope_RB is not None:
                grad_RB.mul_(slope_RB)
            if grad_hidden_ND is not None:
                grad_hidden_ND[block].addmm_(grad_RB, weight_BD)
            if grad_weight_BD is not None:
                grad_weight_BD.addmm_(grad_RB.T, head.hidden_block(block))
            if grad_bias_B is not None:
                grad_bias_B.add_(grad_RB.sum(0))
        if grad_weight_BD is not None and grad_weight.dtype != dtype:
            grad_weight[columns] = grad_weight_BD
        if grad_bias_B is not None:
            grad_bias[columns] = grad_bias_B

    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    if grad_hidden_ND is not None:
        grad_hidden[rows] = grad_hidden_ND.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


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


def _accumulator(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the compute dtype, in the output's own memory if it has that dtype."""
    return out.zero_() if out.dtype == dtype else torch.zeros_like(out, dtype=dtype)


def _positions(labelled: Tensor, rows: Tensor | slice) -> Tensor | slice:
    """Indices of `rows` (of all tokens) among the labelled rows. A slice means that every token is in both."""
    return rows if isinstance(rows, slice) else (labelled.cumsum(0) - 1)[rows]


class KeptTiles:
    """Logits that forward keeps for backward: for all labelled rows, as many vocabulary tiles as fit in `storage`.

    The tiles fill `storage` from its end. If `storage` is the memory of the weight's gradient [V, D], which backward
    writes from the start, each tile lies behind its own slice of the gradient. It is therefore read before it is
    overwritten.
    """

    def __init__(
        self, storage: Tensor, head: TiledHead, n_rows: int | None = None, selected: Tensor | slice = slice(None)
    ) -> None:
        n_rows = head.hidden.shape[0] if n_rows is None else n_rows
        gradient_row = storage.shape[1] * storage.element_size() if storage.dim() == 2 else 0
        self.head, self.selected, self.tiles_NB = head, selected, {}
        self.bytes = storage.view(-1).view(torch.uint8)
        self.start = self.stop = self.bytes.numel() // head.dtype.itemsize * head.dtype.itemsize
        for columns in reversed(list(head.columns())):
            width = columns.stop - columns.start
            start = self.start - n_rows * width * head.dtype.itemsize
            if start >= columns.stop * gradient_row:
                self.tiles_NB[columns.start] = self.bytes[start : self.start].view(head.dtype).view(n_rows, width)
                self.start = start

    def zero_unused(self) -> None:
        self.bytes[: self.start] = 0
        self.bytes[self.stop :] = 0

    def save(self, tile_RB: Tensor, rows: slice, columns: slice) -> None:
        if columns.start in self.tiles_NB:
            self.tiles_NB[columns.start][rows] = tile_RB

    def load(self, rows: slice, columns: slice) -> Tensor | None:
        """A copy in the head's buffer that the caller may overwrite, or None if the tile was not kept."""
        if columns.start not in self.tiles_NB:
            return None
        kept_RB = self.tiles_NB[columns.start][self.selected][rows]
        return self.head.buffer(*kept_RB.shape).copy_(kept_RB)
