"""`logp_floor: auto` and `tau: auto`: the values that are measured."""

from __future__ import annotations

import math

import pytest
import torch

from cwdpo_trainer.errors import InputError
from cwdpo_trainer.stages.cooling import measure_cooling


def test_weights_of_logistic_logprobs_are_uniform():
    rank = (torch.arange(401, dtype=torch.float64) + 0.5) / 401
    logp = -3.0 + 0.7 * torch.log(rank / (1 - rank))
    floor, tau = measure_cooling(logp[torch.randperm(401)])
    assert (floor, tau) == pytest.approx((-3.0, 0.7), rel=5e-3)
    assert torch.allclose(torch.sigmoid((logp - floor) / tau), rank, atol=2e-3)


def test_outliers_do_not_change_the_measurement():
    logp = torch.linspace(-4, -2, 101)
    floor, tau = measure_cooling(logp)
    assert (floor, tau) == pytest.approx((-3.0, 1 / (2 * math.log(3))), rel=1e-5)
    logp[0] = -1e4
    assert measure_cooling(logp) == (floor, tau)


def test_equal_negatives_are_refused():
    with pytest.raises(
        InputError, match=r"automatic cooling: expected rejected answers whose mean log-probs differ .*got"
    ):
        measure_cooling(torch.full((8,), -2.5))
