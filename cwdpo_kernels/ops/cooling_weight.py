"""cooling_weight: the weight of the rejected answer's term. No gradient: the loss treats it as a constant."""

from __future__ import annotations

import torch

from .schema import define, register_fake

define("cooling_weight", "(Tensor mean_logp, float logp_floor, float temperature, float? constant) -> Tensor weight")


@register_fake("cooling_weight")
def _(*, mean_logp, **_):
    return torch.empty_like(mean_logp)
