"""`report_to`: trackers get all logged metrics, probes included."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from cwdpo_trainer.cli import main
from cwdpo_trainer.config import stage_arguments


@pytest.fixture
def tracked(monkeypatch):
    """A list of (step, metrics), one for each log. A fake tracker replaces tensorboard, so it need not be installed."""
    logged: list[tuple[int, dict]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(stage_arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    return logged


def test_a_tracker_gets_losses_and_probes(settings, write_config, tracked):
    del settings["sft"]
    settings["dpo"]["report_to"] = "tensorboard"
    assert main(["run", str(write_config(settings))]) == 0
    assert [step for step, logs in tracked if "loss" in logs] == [2, 4, 6]
    assert all({"margin", "cooling_weight", "kept"} <= logs.keys() for _, logs in tracked if "loss" in logs)
    probes = [(step, logs) for step, logs in tracked if "eval_chosen_logp" in logs]
    assert [step for step, _ in probes] == [0, 3, 6]
    assert all({"eval_near_cooling", "eval_chosen_tv"} <= logs.keys() for _, logs in probes)


def test_no_tracker_unless_one_is_named(settings, write_config, tracked):
    del settings["sft"]
    assert main(["run", str(write_config(settings))]) == 0
    assert tracked == []


def test_a_tracker_that_is_not_installed_is_refused(settings, write_config, monkeypatch, capsys):
    monkeypatch.setattr(stage_arguments, "get_available_reporting_integrations", lambda: ["trackio"])
    settings["dpo"]["report_to"] = ["wandb"]
    assert main(["run", str(write_config(settings))]) == 2
    message = "dpo.report_to: expected installed trackers, out of ['trackio'], got 'wandb'"
    assert message in capsys.readouterr().err
