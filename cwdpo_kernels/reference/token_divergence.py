"""token_divergence from full probabilities."""

import torch
from torch import Tensor

from ..types import Divergence, Head
from .linear_logprob import head_logits


def token_divergence(hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head) -> Divergence:
    log_p = torch.log_softmax(head_logits(hidden_p, head_p), -1)
    log_q = torch.log_softmax(head_logits(hidden_q, head_q), -1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        return torch.where(a == 0, 0.0, a * (log_a - log_b)).sum(-1)  # 0 log 0 = 0

    tv = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return Divergence(tv, (kl(log_p, log_m) + kl(log_q, log_m)) / 2, kl(log_p, log_q))
