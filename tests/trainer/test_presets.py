"""Presets change a config as the paper's ablations do; what the command line says wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwdpo_kernels import Cooling
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.loader import load_config
from cwdpo_trainer.config.presets import preset_names
from cwdpo_trainer.errors import InputError

STAGES = ["sft", "dpo"]


@pytest.fixture
def path(settings, write_config) -> Path:
    settings["sft"] |= {"negatives": "smoothed"}
    settings["dpo"] |= {"logp_floor": -2.0, "tau": 0.5, "drop_below": -9.0, "onpolicy_fraction": 0.25}
    return write_config(settings)


# by preset: stages, (mode and weight of the negatives in stage 1), cooling, on-policy fraction
EXPECTED = {
    "no_filtering": (STAGES, ("smoothed", 0.1), Cooling(-2.0, 0.5), 0.25),
    "constant_weight": (STAGES, ("smoothed", 0.1), Cooling(-2.0, 0.5, 0.5, -9.0), 0.25),
    "hard_constraint": (STAGES, ("hard", 0.1), Cooling(-2.0, 0.5, None, -9.0), 0.25),
    "plain_sft": (STAGES, ("hinge", 0.0), Cooling(-2.0, 0.5, None, -9.0), 0.25),
    "no_stage1": (["dpo"], None, Cooling(-2.0, 0.5, None, -9.0), 0.25),
    "no_stage2": (["sft"], ("smoothed", 0.1), None, None),
    "vanilla_dpo": (STAGES, ("hinge", 0.0), Cooling(-2.0, 0.5, 1.0, None), 0.0),
}


def test_every_preset_has_a_row_here():
    assert preset_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_presets(path, name):
    stages, negatives, cooling, onpolicy = EXPECTED[name]
    config = load_config(path, [f"preset={name}"])
    assert config.stages == stages
    assert config.preset is not None
    assert config.preset.name == config.raw["preset"] == name
    if negatives is not None:
        assert (config.sft.gentle_negatives.mode, config.sft.gentle_negatives.weight) == negatives
    if cooling is not None:
        assert config.dpo.fixed_cooling == cooling
        assert config.dpo.onpolicy_schedule.at(0, 1) == onpolicy


def test_a_preset_of_the_file_is_replaced_by_that_of_the_command_line(settings, write_config):
    path = write_config(settings | {"preset": "no_stage1"})
    assert load_config(path).stages == ["dpo"]
    assert load_config(path, ["preset=no_stage2"]).stages == ["sft"]
    assert load_config(path, ["preset=null"]).stages == STAGES


def test_other_overrides_win_over_the_preset(path):
    config = load_config(path, ["dpo.constant_weight=0.3", "preset=constant_weight"])
    assert config.dpo.fixed_cooling.constant == 0.3
    config = load_config(path, ["dpo.drop_below=-5", "preset=no_filtering"])
    assert config.dpo.drop_below == -5


def test_what_a_preset_changes_is_said(path):
    config = load_config(path, ["preset=vanilla_dpo"])
    assert str(config.preset) == (
        "preset vanilla_dpo: sft.negatives: hinge (was smoothed), sft.negatives_weight: 0.0 (was default), "
        "dpo.cooling: off (was default), dpo.constant_weight: null (was default), dpo.drop_below: null (was -9.0), "
        "dpo.onpolicy_fraction: 0.0 (was 0.25), dpo.normalize: sequence (was default), "
        "dpo.curriculum: null (was default)"
    )
    assert str(load_config(path, ["preset=no_stage1"]).preset) == "preset no_stage1: sft: off (was on)"


def test_an_override_does_not_bring_back_a_stage_that_the_preset_leaves_out(path):
    with pytest.raises(InputError, match=r"command line: dpo.beta: expected dpo to be a mapping, got off"):
        load_config(path, ["preset=no_stage2", "dpo.beta=0.2"])


def test_a_change_that_an_override_replaced_is_not_said(path):
    config = load_config(path, ["preset=no_filtering", "dpo.drop_below=-3"])
    assert str(config.preset) == "preset no_filtering: changes nothing"
    config = load_config(path, ["preset=constant_weight", "dpo.constant_weight=0.3"])
    assert str(config.preset) == "preset constant_weight: dpo.cooling: constant (was default)"


def test_check_and_run_print_the_preset(path, capsys):
    for command in (["check", "--no-model"], ["run"]):
        main([*command, str(path), "preset=no_stage2", "sft.max_steps=1"])
        assert "preset no_stage2: dpo: off (was on)\n" in capsys.readouterr().out


def test_a_section_can_be_switched_off(settings, write_config):
    assert load_config(write_config(settings | {"sft": False})).stages == ["dpo"]
    assert load_config(write_config(settings), ["dpo=off"]).stages == ["sft"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["preset=no_filter"],
            r"preset: expected null or one of constant_weight, .*mean 'no_filtering'\?\), got ",
        ),
        (["preset=[no_stage1]"], r"preset: expected null or one of constant_weight, .*, got \['no_stage1'\]"),
        (["model=off"], "model: expected a mapping, got False"),
        (["preset=no_stage1", "dpo=off"], "a section sft or dpo"),
    ],
)
def test_mistakes(settings, write_config, overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(write_config(settings), overrides)


def test_a_preset_needs_a_section_that_it_changes(settings, write_config):
    path = write_config(settings | {"sft": False})
    with pytest.raises(InputError, match="preset: expected a section sft, which no_stage1 changes, got none"):
        load_config(path, ["preset=no_stage1"])
    assert load_config(path, ["preset=vanilla_dpo"]).stages == ["dpo"]
