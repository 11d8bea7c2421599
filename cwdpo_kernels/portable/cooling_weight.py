"""w_c = sigmoid((mean_logp - logp_floor) / temperature), or a constant."""

from __future__ import annotations

import torch
from torch import Tensor


def cooling_weight(mean_logp: Tensor, logp_floor: float, temperature: float, constant: float | None) -> Tensor:
    if constant is not None:
        return torch.full_like(mean_logp, constant)
    return torch.sigmoid((mean_logp - logp_floor) / temperature)
