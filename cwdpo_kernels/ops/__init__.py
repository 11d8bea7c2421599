"""Importing this package registers every op with torch, and then the backends that run them."""

from . import (
    backends,
    constrained_sft_loss,
    cooling_weight,
    cwdpo_loss,
    linear_logprob,
    logits_logprob,
    sequence_logprob,
    softmax_sums,
    token_divergence,
    token_stats,
)
from .kept_tiles import kept_bytes
from .registry import backend, backend_details, default_workspace_bytes, forced, missing_backend, register_backend
from .schema import apply

backends.register()

__all__ = [
    "apply",
    "backend",
    "backend_details",
    "constrained_sft_loss",
    "cooling_weight",
    "cwdpo_loss",
    "default_workspace_bytes",
    "forced",
    "kept_bytes",
    "linear_logprob",
    "logits_logprob",
    "missing_backend",
    "register_backend",
    "sequence_logprob",
    "softmax_sums",
    "token_divergence",
    "token_stats",
]
