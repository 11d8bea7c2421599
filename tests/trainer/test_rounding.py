"""bfloat16 weights lose small updates. `cwdpo check` says how many, and a run says how many moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cwdpo_trainer.cli import main
from cwdpo_trainer.rounding import count_moved, is_rounded, share_that_moves


def layer(values, dtype=torch.bfloat16):
    module = nn.Linear(len(values), 1, bias=False, dtype=dtype)
    module.weight.data.copy_(torch.tensor([values]))
    return module


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [
        (1.0, 2.0**-8 * 1.01, 1.0),  # neighbours: 1 + 2^-7 and 1 - 2^-8
        (1.0, 2.0**-8 * 0.99, 0.5),
        (1.0, 2.0**-9 * 1.01, 0.5),
        (1.0, 2.0**-9 * 0.99, 0.0),
        (1.5, 2.0**-8 * 1.01, 1.0),
        (1.5, 2.0**-8 * 0.99, 0.0),
        (0.0, 1e-9, 1.0),
    ],
)
def test_an_update_counts_from_half_the_distance_to_the_next_number(value, size, expected):
    assert share_that_moves(layer([value]), size) == expected


def test_the_share_is_over_the_trained_low_precision_weights():
    model = nn.Sequential(layer([1.5, 0.0, 1.5, 1.5]), layer([0.0], torch.float32), layer([0.0]))
    model[2].requires_grad_(False)
    assert share_that_moves(model, 1e-6) == 0.25
    assert share_that_moves(layer([1.5], torch.float32), 1e-6) is None


def test_moved_weights_are_counted():
    model, start = layer([1.0, 2.0, 3.0]), layer([1.0, 2.0, 4.0])
    assert count_moved(model, start) == (1, 3)
    assert count_moved(model.requires_grad_(False), start) == (0, 0)


@pytest.mark.parametrize(
    ("optim", "optim_args", "expected"),
    [
        ("adamw_torch", None, True),
        ("adamw_torch_fused", None, True),
        ("paged_lion_32bit", None, True),
        ("stable_adamw", None, False),
        ("adamw_torch_8bit", None, True),
        ("adamw_torch_8bit", "block_size=128, bf16_stochastic_round=True", False),
        ("sgd", None, False),
    ],
)
def test_optimizers_that_keep_small_updates_are_known(optim, optim_args, expected):
    assert is_rounded(optim, optim_args) is expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_check_warns_and_the_run_measures(settings, write_config, capsys, dtype):
    settings["model"]["dtype"] = dtype
    for stage in ("sft", "dpo"):
        settings[stage] |= {"learning_rate": 1e-7, "max_steps": 1, "optim": "adamw_torch"}
    del settings["dpo"]
    path = write_config(settings)
    main(["check", str(path)])
    checked = capsys.readouterr().out
    assert ("warning rounded_updates: the bfloat16 weights would lose most updates" in checked) == (dtype == "bfloat16")
    assert main(["run", str(path)]) == 0
    moved = json.loads((Path(settings["output_dir"]) / "metrics.json").read_text())["after_sft"].get("weights_moved")
    printed = capsys.readouterr().out
    if dtype == "float32":
        assert moved is None
        assert "trained weights moved" not in printed
        return
    predicted = float(checked.split("sft.learning_rate 1e-07 moves at most ")[1].split("%")[0]) / 100
    assert moved <= predicted + 0.001
    assert predicted < 0.1
    assert f"sft: {moved:.2%} of the trained weights moved; train float32 weights (model.dtype: float32" in printed
    assert "-> train float32 weights (model.dtype: float32, with bf16: true in the stages)" in checked
