"""Registers every op under torch.ops.cwdpo: importing this package is what makes them exist."""

from . import (
    constrained_sft_loss,
    cooling_weight,
    cwdpo_loss,
    library,
    linear_logprob,
    logits_logprob,
    sequence_logprob,
    token_divergence,
    token_stats,
)
from .linear_logprob import kept_bytes
from .registry import backend, forced, missing_backend

library.missing()  # loads it: every schema is defined by now

BACKENDS_CHOICE = 0  # a workspace of this many bytes leaves its size to the backend

__all__ = [
    "BACKENDS_CHOICE",
    "backend",
    "constrained_sft_loss",
    "cooling_weight",
    "cwdpo_loss",
    "forced",
    "kept_bytes",
    "linear_logprob",
    "logits_logprob",
    "missing_backend",
    "sequence_logprob",
    "token_divergence",
    "token_stats",
]
