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
from cwdpo_kernels.ops.linear_logprob import useful_kept_bytes
from cwdpo_kernels.ops.registry import backend, forced

BACKENDS_CHOICE = 0  # a workspace of this many bytes leaves its size to the backend

__all__ = [
    "BACKENDS_CHOICE",
    "backend",
    "constrained_sft_loss",
    "cooling_weight",
    "cwdpo_loss",
    "forced",
    "linear_logprob",
    "logits_logprob",
    "sequence_logprob",
    "token_divergence",
    "token_stats",
    "useful_kept_bytes",
]
