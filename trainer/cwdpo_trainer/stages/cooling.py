"""`logp_floor: auto` and `tau: auto`: choose the parameters of the cooling weight from log-probs of the reference.

This module only chooses logp_floor and tau. The weight itself is computed by the loss op, see `CWDPOTrainer`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cwdpo_trainer.errors import require


def measure_cooling(mean_logp: Tensor, *, needs_tau: bool = True) -> tuple[float, float]:
    """(logp_floor, tau) from the mean log-probs [K] of rejected answers under the reference, in nats per token.

        logp_floor = median        tau = (upper quartile - lower quartile) / (2 ln 3)

    If the quartiles are symmetric about the median, w_c = sigmoid((l - logp_floor) / tau) starts at 1/4, 1/2 and 3/4
    at the three quartiles. If the log-probs follow a logistic distribution, w_c is uniform in [0, 1]. So training
    starts with weights that differ between negatives, for any model, task and answer length: neither all 1 (plain
    DPO) nor all 0. A few extremely unlikely answers change neither the median nor the quartiles.

    Raises `InputError` if the quartiles are equal, because tau would be 0. Without `needs_tau` that is accepted: tau is
    then NaN.
    """
    quarter, half, three = torch.quantile(mean_logp.double(), mean_logp.new_tensor([0.25, 0.5, 0.75]).double()).tolist()
    spread = three - quarter
    require(math.isfinite(half), "automatic cooling", "", "rejected answers with a finite median of log-probs", half)
    if not needs_tau:
        return half, math.nan
    expected = "rejected answers whose mean log-probs differ (else set tau to a number)"
    require(0 < spread < math.inf, "automatic cooling", "", expected, f"an interquartile range of {spread}")
    return half, spread / (2 * math.log(3))
