"""TRL's trainers take the same steps with our head as with TRL's own, in float32; in bfloat16 ours is more accurate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import trl_head, trl_head_report

TRAINERS = ("SFT", "DPO, hinge", "KTO", "GRPO, entropy bonus", "RLOO")


@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps_equal_those_with_trls_head(name):
    case = trl_head.CASES[name]
    theirs, ours = (trl_head.train(case, head, bf16=False, steps=2) for head in (False, True))
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-5, atol=1e-5)
    assert (ours.update - theirs.update).norm() < 1e-3 * theirs.update.norm()
    assert theirs.update.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", trl_head.CASES)
def test_ten_steps(name):
    measured = trl_head.measure(trl_head.CASES[name], 1, None)
    theirs, ours = measured["bfloat16"].values()
    assert measured["float32"]["loss"] <= 1e-5
    assert ours["loss"] < theirs["loss"]
    assert ours["update"] < theirs["update"]


def test_nothing_is_reported_of_different_losses(monkeypatch):
    case = dataclasses.replace(trl_head.CASES["SFT"])
    losses = iter((1.0, 2.0, 1.1, 2.0))  # TRL's head in float32 and bfloat16, then ours
    run = lambda *_: trl_head.Run(torch.tensor([next(losses)]), torch.ones(3))  # noqa: E731
    monkeypatch.setattr(trl_head, "train", run)
    with pytest.raises(SystemExit, match=r"trl_head: losses in float32 differ by .*, nothing is reported"):
        trl_head.measure(case, 1, None)


def test_the_report_says_how_often_ours_is_nearer():
    def entry(name, theirs, ours):
        errors = {trl_head.TRL: {"loss": theirs, "update": 0.2}, trl_head.OURS: {"loss": ours, "update": 0.1}}
        return {"name": name, "steps": 10, "float32": {"loss": 1e-7, "update": 2e-5}, "bfloat16": errors}

    environment = {"versions": {"trl": "1.16.0"}, "device": "CPU"}
    text = trl_head_report.section(
        {"environment": environment, "measurements": [entry("a", 4.0, 1.0), entry("b", 1.0, 2.0)]}
    )
    assert "| a | 1e-07 | 2e-05 | 4.0e+00 | 1.0e+00 | 2.0e-01 | 1.0e-01 |" in text
    assert (
        "by losses, ours is nearer to float32 in 1 of 2 cases (error relative to that of TRL's head: 0.25 to 2.00)"
        in text
    )
    assert "by weights, ours is nearer to float32 in 2 of 2 cases" in text
