"""Eager truth: full logits and plain autograd, any dtype including float64. For tests and benchmarks only."""

from cwdpo_kernels.reference.constrained_sft_loss import constrained_sft_loss
from cwdpo_kernels.reference.cwdpo_loss import cwdpo_loss
from cwdpo_kernels.reference.linear_logprob import head_logits, linear_logprob
from cwdpo_kernels.reference.logits_logprob import logits_logprob
from cwdpo_kernels.reference.sequence_logprob import sequence_logprob
from cwdpo_kernels.reference.token_divergence import token_divergence
from cwdpo_kernels.reference.token_stats import token_stats

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
