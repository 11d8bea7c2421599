"""cooling_weight: how hard a rejected answer pushes. No gradient: the weight is a constant of the loss."""

from __future__ import annotations

import torch

from .._ops import add_op_namespace_prefix
from .registry import define

define("cooling_weight", "(Tensor mean_logp, float logp_floor, float temperature, float? constant) -> Tensor")


@torch.library.register_fake(add_op_namespace_prefix("cooling_weight"))
def _(mean_logp, logp_floor, temperature, constant):
    return torch.empty_like(mean_logp)
