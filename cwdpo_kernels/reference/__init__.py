"""Eager reference: full logits and plain autograd, in any dtype including float64. For tests and benchmarks only."""

from .constrained_sft_loss import constrained_sft_loss
from .cwdpo_loss import cwdpo_loss
from .linear_logprob import head_logits, linear_logprob
from .logits_logprob import logits_logprob
from .sequence_logprob import sequence_logprob
from .token_divergence import token_divergence
from .token_stats import token_stats

__all__ = [
    "constrained_sft_loss",
    "cwdpo_loss",
    "head_logits",
    "linear_logprob",
    "logits_logprob",
    "sequence_logprob",
    "token_divergence",
    "token_stats",
]
