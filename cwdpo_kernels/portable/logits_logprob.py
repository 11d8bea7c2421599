"""Log-probabilities of labels from existing logits: the algebra of linear_logprob, one block of rows at a time.

Forward reads the logits once. Backward reads them once and writes the gradient once, in place if asked to.
Legend: N labelled rows, R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear_logprob import exp_factor_of, logp_of
from .tiles import blocks, compute_dtype, rows_where

BLOCK_BYTES = 4 << 20


def logits_logprob(
    logits: Tensor, labels: Tensor, ignore_index: int, reuse_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, anchor and sum_exp [N]; 0 where ignored. Only backward reads `reuse_logits`."""
    dtype = compute_dtype(logits.dtype)
    logp, anchor, sum_exp = (torch.zeros(labels.shape, dtype=dtype, device=logits.device) for _ in range(3))
    for rows in _row_blocks(labels != ignore_index, logits.shape[1], dtype):
        labels_R1 = labels[rows].long()[:, None]
        competitors_RV = logits[rows].to(dtype, copy=True)
        target_R = competitors_RV.gather(1, labels_R1).squeeze(1)
        competitors_RV.scatter_(1, labels_R1, -torch.inf)
        anchor_R = competitors_RV.amax(1).clamp_min(torch.finfo(dtype).min)  # V = 1 has no competitor: sum_exp = 0
        sum_exp_R = competitors_RV.sub_(anchor_R[:, None]).exp_().sum(1)
        anchor[rows], sum_exp[rows], logp[rows] = anchor_R, sum_exp_R, logp_of(target_R, anchor_R, sum_exp_R)
    return logp, anchor, sum_exp


def logits_logprob_backward(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, anchor: Tensor, sum_exp: Tensor, ignore_index: int
) -> Tensor:
    """d logp / d z_v = (1 - p_y) * (1 if v == y else -q_v), in a new tensor."""
    grad_logits = torch.zeros_like(logits)
    _write_gradient(grad_logp, logits, labels, logp, anchor, sum_exp, ignore_index, grad_logits)
    return grad_logits


def logits_logprob_backward_(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, anchor: Tensor, sum_exp: Tensor, ignore_index: int
) -> None:
    """`logits_logprob_backward` in place: each block of logits is read before it is overwritten."""
    _write_gradient(grad_logp, logits, labels, logp, anchor, sum_exp, ignore_index, logits)
    without_gradient = rows_where((labels == ignore_index) | (grad_logp == 0))
    logits[without_gradient] = 0


def _write_gradient(
    grad_logp: Tensor,
    logits: Tensor,
    labels: Tensor,
    logp: Tensor,
    anchor: Tensor,
    sum_exp: Tensor,
    ignore_index: int,
    out: Tensor,
) -> None:
    dtype = compute_dtype(logits.dtype)
    for rows in _row_blocks((labels != ignore_index) & (grad_logp != 0), logits.shape[1], dtype):
        grad_target_R1 = (grad_logp[rows].to(dtype) * -torch.expm1(logp[rows])).unsqueeze(1)  # 1 - p_y = -expm1(logp)
        tile_RV = logits[rows].to(dtype, copy=True).sub_(anchor[rows, None]).exp_()
        tile_RV.mul_(exp_factor_of(grad_target_R1, sum_exp[rows, None]))
        out[rows] = tile_RV.scatter_(1, labels[rows].long()[:, None], grad_target_R1).to(out.dtype)


def _row_blocks(mask: Tensor, vocab: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Indices of the rows where `mask` holds, a block of about BLOCK_BYTES at a time."""
    rows = mask.nonzero().squeeze(1)
    for block in blocks(rows.numel(), max(BLOCK_BYTES // (vocab * dtype.itemsize), 1)):
        yield rows[block]
