"""Label smoothing without a vocabulary pass: how far a label's logit lies above the mean logit."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Head


def lead_over_mean_logit(hidden: Tensor, head: Head, labels: Tensor, ignore_index: int) -> Tensor:
    """z_y - mean_v z_v per token = scale * (h . (W_y - mean W) + b_y - mean b), for a head without a soft cap.

    hidden [..., D], labels [...] -> [...], float32 (float64 for float64); 0 where ignored. Label-smoothed
    cross-entropy is NLL + smoothing * (z_y - mean_v z_v).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ignored = labels == ignore_index
    # Backward multiplies hidden states by a gradient of 0, so those of ignored tokens must be finite.
    hidden, labels = hidden.masked_fill(ignored.unsqueeze(-1), 0.0), labels.masked_fill(ignored, 0)
    contrast = head.weight[labels].to(dtype) - head.weight.mean(0, dtype=dtype)
    lead = (hidden.to(dtype) * contrast).sum(-1)
    if head.bias is not None:
        lead = lead + head.bias[labels].to(dtype) - head.bias.mean(dtype=dtype)
    return (lead * head.scale).masked_fill(ignored, 0.0)
