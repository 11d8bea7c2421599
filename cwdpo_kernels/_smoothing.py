"""Label smoothing without a vocabulary pass: how far a label's logit lies above the mean logit."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Head


def lead_over_mean_logit(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """z_y - mean_v z_v per token = scale * (h . (W_y - mean W) + b_y - mean b), for a head without a soft cap.

    hidden [..., D], labels [...] in [0, V) -> [...], float32 (float64 for float64). Label-smoothed cross-entropy is
    NLL + smoothing * (z_y - mean_v z_v).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    contrast = head.weight[labels].to(dtype) - head.weight.mean(0, dtype=dtype)
    lead = (hidden.to(dtype) * contrast).sum(-1)
    if head.bias is not None:
        lead = lead + head.bias[labels].to(dtype) - head.bias.mean(dtype=dtype)
    return lead * head.scale
