"""Log-probabilities of labels from logits that already exist: the algebra of linear_logprob, a block of rows at a time.

Forward reads the logits once; backward reads them once and writes the gradient once, on request over the logits
themselves. Legend: N labelled rows, R rows of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear_logprob import logp_of
from .tiles import blocks, compute_dtype, live_rows

BLOCK_BYTES = 4 << 20


def logits_logprob(
    logits: Tensor, labels: Tensor, ignore_index: int, reuse_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, peak and total [N]; 0 where ignored. `reuse_logits` matters to backward only."""
    dtype = compute_dtype(logits.dtype)
    logp, peak, total = (torch.zeros(labels.shape, dtype=dtype, device=logits.device) for _ in range(3))
    for rows in _row_blocks(labels != ignore_index, logits.shape[1], dtype):
        labels_R1 = labels[rows].long()[:, None]
        competitors_RV = logits[rows].to(dtype, copy=True)
        target_R = competitors_RV.gather(1, labels_R1).squeeze(1)
        competitors_RV.scatter_(1, labels_R1, -torch.inf)
        peak_R = competitors_RV.amax(1).clamp_min(torch.finfo(dtype).min)  # V = 1 has no competitor: total = 0
        total_R = competitors_RV.sub_(peak_R[:, None]).exp_().sum(1)
        peak[rows], total[rows], logp[rows] = peak_R, total_R, logp_of(target_R, peak_R, total_R)
    return logp, peak, total


def logits_logprob_backward(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, peak: Tensor, total: Tensor, ignore_index: int
) -> Tensor:
    """d logp / d z_v = (1 - p_y) * (1 if v == y else -q_v), in new memory."""
    grad_logits = torch.zeros_like(logits)
    _write_gradient(grad_logp, logits, labels, logp, peak, total, ignore_index, grad_logits)
    return grad_logits


def logits_logprob_backward_(
    grad_logp: Tensor, logits: Tensor, labels: Tensor, logp: Tensor, peak: Tensor, total: Tensor, ignore_index: int
) -> None:
    """The same, over the logits' own memory: a block is read before it is overwritten."""
    _write_gradient(grad_logp, logits, labels, logp, peak, total, ignore_index, logits)
    dead = live_rows((labels == ignore_index) | (grad_logp == 0))
    logits[dead] = 0


def _write_gradient(
    grad_logp: Tensor,
    logits: Tensor,
    labels: Tensor,
    logp: Tensor,
    peak: Tensor,
    total: Tensor,
    ignore_index: int,
    out: Tensor,
) -> None:
    dtype = compute_dtype(logits.dtype)
    for rows in _row_blocks((labels != ignore_index) & (grad_logp != 0), logits.shape[1], dtype):
        pull_R1 = (grad_logp[rows].to(dtype) * -torch.expm1(logp[rows])).unsqueeze(1)  # 1 - p_y = -expm1(logp)
        tile_RV = logits[rows].to(dtype, copy=True).sub_(peak[rows, None]).exp_()
        tile_RV.mul_(-pull_R1 / total[rows, None])
        out[rows] = tile_RV.scatter_(1, labels[rows].long()[:, None], pull_R1).to(out.dtype)


def _row_blocks(mask: Tensor, vocab: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Indices of the rows where `mask` holds, a block of about BLOCK_BYTES at a time."""
    rows = mask.nonzero().squeeze(1)
    for block in blocks(rows.numel(), max(BLOCK_BYTES // (vocab * dtype.itemsize), 1)):
        yield rows[block]
