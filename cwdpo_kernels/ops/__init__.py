"""Registers every op under torch.ops.cwdpo: importing this package is what makes them exist."""

from cwdpo_kernels.ops import (
    constrained_sft_loss,
    cooling_weight,
    cwdpo_loss,
    linear_logprob,
    logits_logprob,
    sequence_logprob,
    token_divergence,
    token_stats,
)
from cwdpo_kernels.ops.registry import backend

__all__ = [
    "backend",
    "constrained_sft_loss",
    "cooling_weight",
    "cwdpo_loss",
    "linear_logprob",
    "logits_logprob",
    "sequence_logprob",
    "token_divergence",
    "token_stats",
]
