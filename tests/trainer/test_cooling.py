"""`logp_floor: auto` and `tau: auto`: the values that are measured."""

from __future__ import annotations

import math

import pytest
import torch

from cwdpo_trainer.config.stage_arguments import DPOArguments
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


def test_equal_negatives_have_a_floor():
    floor, tau = measure_cooling(torch.full((8,), -2.5), needs_tau=False)
    assert floor == -2.5
    assert math.isnan(tau)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("needs_tau", [True, False])
def test_log_probs_that_are_not_finite_are_refused(value, needs_tau):
    with pytest.raises(InputError, match="expected rejected answers with a finite median of log-probs"):
        measure_cooling(torch.full((8,), value), needs_tau=needs_tau)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"logp_floor": "auto", "tau": 0.5}, False), ({"logp_floor": -3.0, "tau": "auto"}, True),
        ({"logp_floor": "auto", "tau": "auto"}, True), ({"logp_floor": -3.0, "tau": 0.5}, False),
        ({"tau": "auto", "cooling": "off", "drop_below": None}, False), ({"tau": "auto", "cooling": "off"}, True),
    ],
    ids=str,
)  # fmt: skip
def test_when_tau_is_measured(changes, measured, tmp_path):
    assert DPOArguments(output_dir=str(tmp_path), **changes).is_tau_measured is measured
