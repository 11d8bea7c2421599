"""logits_logprob with log_softmax and gather."""

import torch
from torch import Tensor

from ..types import IGNORE_INDEX


def logits_logprob(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """[...] in the dtype of `logits`; 0 where ignored."""
    safe = labels.masked_fill(labels == ignore_index, 0).long()
    logp = torch.log_softmax(logits, -1).gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == ignore_index, 0.0, logp)
