"""Gradients of a head's hidden states, weight and bias from the gradient of its logits, one tile at a time.

The gradient of a token's logits is given by three numbers. With y the label and u_v = exp(z_v - anchor),

    grad_target                                        at v = y
    u_v * (exp_factor + log_factor * (z_v - anchor))   elsewhere

both times the slope of the soft cap. log_factor is nonzero only if the entropy has a gradient. 3 N D V multiply-adds;
2 N D V for kept tiles. Memory: one tile and N x D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kept import KeptTiles
from .tiles import TiledHead, fill_target, rows_where

# nats: exp(-NEGLIGIBLE) is 0 in every dtype. Distances are cut off here, because 0 * -inf would be NaN.
NEGLIGIBLE = 1e3


@dataclass(frozen=True)
class LogitGrads:
    """The three numbers of every token [N], its label and anchor. log_factor None: 0 for all tokens."""

    labels: Tensor
    labelled: Tensor
    anchor: Tensor
    grad_target: Tensor
    exp_factor: Tensor
    log_factor: Tensor | None = None

    def rows(self) -> Tensor | slice:
        """The labelled tokens whose logits have a gradient."""
        used = (self.grad_target != 0) | (self.exp_factor != 0)
        return rows_where(self.labelled & (used if self.log_factor is None else used | (self.log_factor != 0)))

    def at(self, rows: Tensor | slice) -> LogitGrads:
        log_factor = None if self.log_factor is None else self.log_factor[rows]
        return LogitGrads(
            self.labels[rows].long(), self.labelled[rows], self.anchor[rows], self.grad_target[rows],
            self.exp_factor[rows], log_factor,
        )  # fmt: skip

    def of_tile(self, tile_RB: Tensor, block: slice, columns: slice) -> Tensor:
        """The gradient of a tile of logits, in place, without the slope of the soft cap."""
        tile_RB.sub_(self.anchor[block, None])
        if self.log_factor is None:
            tile_RB.exp_().mul_(self.exp_factor[block, None])
        else:
            factor_RB = tile_RB.clamp_min(-NEGLIGIBLE).mul_(self.log_factor[block, None])
            tile_RB.exp_().mul_(factor_RB.add_(self.exp_factor[block, None]))
        # Replaces exp(c - anchor), which may overflow.
        fill_target(tile_RB, self.labels[block], columns, self.grad_target[block, None])
        return tile_RB


def head_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, grads: LogitGrads, kept: Tensor, scale: float,
    softcap: float | None, needs_hidden: bool, needs_weight: bool, needs_bias: bool, workspace_bytes: int,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, D], weight [V, D] and bias [V]; empty where not needed.

    The weight's gradient is written to `grad_weight` if that is given. `kept`: see kept.py.
    """
    if grad_weight is None:
        grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    rows, n_labelled = grads.rows(), int(grads.labelled.sum())
    # Forward planned its tiles for all labelled rows. Use the same plan, so that kept tiles have the same boundaries.
    head = TiledHead(hidden[rows], weight, bias, scale, softcap, workspace_bytes, max_rows=n_labelled)
    kept_tiles = KeptTiles(kept, head, n_labelled, selected=_positions(grads.labelled, rows))
    grads = grads.at(rows)
    grad_hidden_ND = grads.anchor.new_zeros(head.hidden.shape) if needs_hidden else None
    grad_bias = weight.new_empty(0) if bias is None or not needs_bias else torch.empty_like(bias)

    for columns in head.columns():
        weight_BD = head.weight_tile(columns)
        grad_weight_BD = _accumulator(grad_weight[columns], head.dtype) if needs_weight else None
        grad_bias_B = weight_BD.new_zeros(weight_BD.shape[0]) if needs_bias else None
        for block in head.rows():
            tile_RB = kept_tiles.load(block, columns)
            if tile_RB is None:
                tile_RB = head.logits(block, columns, weight_BD)
            slope_RB = head.slope(tile_RB)
            grad_RB = grads.of_tile(tile_RB, block, columns)
            if slope_RB is not None:
                grad_RB.mul_(slope_RB)
            if grad_hidden_ND is not None:
                grad_hidden_ND[block].addmm_(grad_RB, weight_BD)
            if grad_weight_BD is not None:
                grad_weight_BD.addmm_(grad_RB.T, head.hidden_block(block))
            if grad_bias_B is not None:
                grad_bias_B.add_(grad_RB.sum(0))
        if grad_weight_BD is not None and grad_weight.dtype != head.dtype:
            grad_weight[columns] = grad_weight_BD
        if grad_bias_B is not None:
            grad_bias[columns] = grad_bias_B

    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    if grad_hidden_ND is not None:
        grad_hidden[rows] = grad_hidden_ND.to(hidden.dtype)
    return grad_hidden, grad_weight, grad_bias


def _accumulator(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the compute dtype, in the output's own memory if it has that dtype."""
    return out.zero_() if out.dtype == dtype else torch.zeros_like(out, dtype=dtype)


def _positions(labelled: Tensor, rows: Tensor | slice) -> Tensor | slice:
    """Indices of `rows` (of all tokens) among the labelled rows. A slice means that every token is in both."""
    return rows if isinstance(rows, slice) else (labelled.cumsum(0) - 1)[rows]
