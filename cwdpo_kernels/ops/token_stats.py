"""token_stats: log-probability, entropy, top-1 probability and correctness per token. No gradient."""

from __future__ import annotations

import torch

from ..portable.tiles import compute_dtype
from .schema import define, register_fake

define(
    "token_stats",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "SymInt workspace_bytes) -> (Tensor logp, Tensor entropy, Tensor top1_prob, Tensor is_top1)",
)


@register_fake("token_stats")
def _(*, hidden, labels, **_):
    logp = hidden.new_empty(labels.shape, dtype=compute_dtype(hidden.dtype))
    return logp, torch.empty_like(logp), torch.empty_like(logp), torch.empty_like(logp, dtype=torch.bool)
