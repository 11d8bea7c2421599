"""token_stats from full probabilities."""

import torch
from torch import Tensor

from ..types import IGNORE_INDEX, Head, TokenStats
from .linear_logprob import head_logits
from .logits_logprob import logits_logprob


def token_stats(hidden: Tensor, head: Head, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> TokenStats:
    logits = head_logits(hidden, head)
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)  # 0 log 0 = 0
    used = labels != ignore_index
    return TokenStats(
        logits_logprob(logits, labels, ignore_index),
        torch.where(used, entropy, 0.0),
        torch.where(used, log_p.amax(-1).exp(), 0.0),
        used & (log_p.argmax(-1) == labels),
    )
