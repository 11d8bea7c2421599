"""cooling_weight: how hard a rejected answer pushes. No gradient: the weight is a constant of the loss."""

from __future__ import annotations

import torch

from ..portable import cooling_weight as portable
from .registry import define, implement

define("cooling_weight", "(Tensor mean_logp, float logp_floor, float temperature, float? constant) -> Tensor")
implement("cooling_weight", portable.cooling_weight)


@torch.library.register_fake("cwdpo::cooling_weight")
def _(mean_logp, logp_floor, temperature, constant):
    return torch.empty_like(mean_logp)
