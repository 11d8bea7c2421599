"""constrained_sft_loss from full logits, one answer at a time."""

import torch
from torch import Tensor

from ..types import IGNORE_INDEX, GentleNegatives


def constrained_sft_loss(
    logits: Tensor, labels: Tensor, negatives: GentleNegatives, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """The scalar loss of logits [2P, T, V], chosen first, with torch's own label-smoothed cross-entropy."""
    pairs = labels.shape[0] // 2

    def batch_nll(rows: range, smoothing: float = 0.0) -> tuple[Tensor, int]:
        answers = []
        for row in rows:
            used = labels[row] != ignore_index
            if used.any():
                reduction = "mean" if negatives.normalize == "token" else "sum"
                answers.append(
                    torch.nn.functional.cross_entropy(
                        logits[row][used], labels[row][used].long(), label_smoothing=smoothing, reduction=reduction
                    )
                )
        return (torch.stack(answers).mean() if answers else logits.sum() * 0.0), len(answers)

    chosen, _ = batch_nll(range(pairs))
    if negatives.mode == "smoothed":
        return chosen + negatives.weight * batch_nll(range(pairs, 2 * pairs), negatives.smoothing)[0]
    rejected, n_rejected = batch_nll(range(pairs, 2 * pairs))
    shortfall = negatives.nll_floor - rejected
    if negatives.mode == "hard":
        return shortfall if n_rejected and shortfall > 0 else chosen
    return chosen + (negatives.weight * torch.relu(shortfall) if n_rejected else 0.0)
