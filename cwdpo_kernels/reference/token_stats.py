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
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)  # 0 log 0 = 0
    used = labels != ignore_index
    fields = {
        "entropy": entropy, "top1_prob": log_p.amax(-1).exp(), "logsumexp": torch.logsumexp(logits, -1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1), "mean_logit": logits.mean(-1),
    }  # fmt: skip
    return TokenStats(
        logp=logits_logprob(logits, labels, ignore_index), is_top1=used & (log_p.argmax(-1) == labels),
        **{name: torch.where(used, field, 0.0) for name, field in fields.items()},
    )  # fmt: skip
