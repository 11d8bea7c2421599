"""`logp_floor: auto`, `tau: auto`: where the cooling weight turns, measured on the model that stage 2 starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cwdpo_trainer.errors import require


def measure_cooling(mean_logp: Tensor) -> tuple[float, float]:
    """(logp_floor, tau) from the mean log-probs [K] of rejected answers under the reference, in nats per token.

        logp_floor = median        tau = (upper quartile - lower quartile) / (2 ln 3)

    With these the weight w_c = sigmoid((l - logp_floor) / tau) starts at 1/4, 1/2 and 3/4 at quartiles that lie
    evenly about the median; were the log-probs logistically distributed, w_c would be a negative's rank among all,
    uniform in [0, 1]. So training starts at neither of the ends where cooling does nothing (all weights 1, as in
    DPO, or 0), whatever the model, the task and the lengths of its answers. Median and quartiles do not mind the
    few answers that a model finds impossible.

    Raises `InputError` where the quartiles are equal: such negatives have no scale.
    """
    quarter, half, three = torch.quantile(mean_logp.double(), mean_logp.new_tensor([0.25, 0.5, 0.75]).double()).tolist()
    spread = three - quarter
    expected = "rejected answers whose mean log-probs differ (else set logp_floor and tau to numbers)"
    require(spread > 0, "automatic cooling", "", expected, f"an interquartile range of {spread}")
    return half, spread / (2 * math.log(3))
