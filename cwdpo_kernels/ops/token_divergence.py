"""token_divergence: TV, JS and KL between two heads' next-token distributions, per token. No gradient."""

from __future__ import annotations

import torch

from ..portable.tiles import compute_dtype
from .schema import define, register_fake

define(
    "token_divergence",
    "(Tensor hidden_p, Tensor weight_p, Tensor? bias_p, float scale_p, float? softcap_p, "
    "Tensor hidden_q, Tensor weight_q, Tensor? bias_q, float scale_q, float? softcap_q, SymInt workspace_bytes) "
    "-> (Tensor tv, Tensor js, Tensor kl)",
)


@register_fake("token_divergence")
def _(*, hidden_p, **_):
    tv = hidden_p.new_empty(hidden_p.shape[0], dtype=compute_dtype(hidden_p.dtype))
    return tv, torch.empty_like(tv), torch.empty_like(tv)
