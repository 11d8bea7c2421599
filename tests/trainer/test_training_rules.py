"""Options of `TrainingArguments` that would fail later are refused with the config, by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml
from transformers import TrainingArguments

from cwdpo_trainer.cli import main
from cwdpo_trainer.config.loader import load_config, read_config
from cwdpo_trainer.config.stage_arguments import SFTArguments
from cwdpo_trainer.config.training_rules import RULES, check_batches
from cwdpo_trainer.errors import InputError

# One option and a value that training would stop at, or that would spoil it.
REFUSED = {
    "per_device_train_batch_size": [0, -1],
    "gradient_accumulation_steps": [0],
    "num_train_epochs": [0, -3, ".nan", ".inf"],
    "max_steps": [0, -2],
    "learning_rate": [-1, ".nan", ".inf"],
    "warmup_steps": [-1, ".nan"],
    "weight_decay": [-0.1, ".nan"],
    "adam_beta1": [1, -0.5, ".nan"],
    "adam_beta2": [1.5],
    "adam_epsilon": [-1e-8, 0.0],
    "max_grad_norm": [-1, ".nan"],
    "neftune_noise_alpha": [-1],
    "torch_empty_cache_steps": [0],
    "torch_compile_mode": ["fast"],
    "torch_compile_backend": ["gcc"],
    "eval_delay": [-1],
    "log_level": ["loud"],
    "log_level_replica": ["loud"],
    "train_sampling_strategy": ["by_luck"],
    "dataloader_num_workers": [-1],
    "dataloader_prefetch_factor": [2, -1],
    "dataloader_persistent_workers": ["true"],
    "ddp_bucket_cap_mb": [0],
    "ddp_timeout": [0],
    "save_total_limit": [1, -1],
    "logging_steps": [0, -1, 1.5, ".nan"],
    "eval_steps": [-1, 2.5],
    "save_steps": [0, -1, 2.5],
    "lr_scheduler_type": ["wavy", "cosine_with_min_lr"],
    "lr_scheduler_kwargs": ["{min_lr: 1}", "x"],
    "optim": ["adma", "galore_adamw"],
    "optim_args": ["x"],
    "eval_strategy": ["sometimes"],
    "save_strategy": ["sometimes"],
    "hub_strategy": ["sometimes"],
    "accelerator_config": [
        "{x: 1}",
        "gone.json",
        "{gradient_accumulation_kwargs: {x: 1}}",
        "{gradient_accumulation_kwargs: {num_steps: 2}}",
    ],
    "activation_checkpointing_kwargs": ["{x: 1}"],
    "fsdp": ["full_shard"],
    "report_to": ["nobody"],
}
CASES = [(key, value) for key, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_a_value_is_refused_by_name(settings, write_config, key, value):
    if key not in {spec.name for spec in dataclasses.fields(TrainingArguments)}:
        pytest.skip("not in this version of transformers")
    config, errors = read_config(write_config(settings), [f"dpo.{key}={value}"])
    assert [error.what for error in errors] == [f"dpo.{key}"]
    assert "got " in str(errors[0])
    assert config.dpo is not None  # without the option, so that the rest can be checked


def test_every_rule_has_a_case():
    assert set(RULES) <= set(REFUSED)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"load_best_model_at_end": True}, "metric_for_best_model"),
        ({"save_strategy": "best"}, "metric_for_best_model"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "metric_for_best_model"),
        ({"lr_scheduler_type": "greedy"}, "metric_for_best_model"),
        ({"early_stopping_patience": 2, "metric_for_best_model": "chosen_ece", "eval_strategy": "no"}, "eval_strategy"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "chosen_ece", "save_steps": 4}, "eval_steps"),
        ({"fp16": True, "bf16": True, "use_cpu": True}, "bf16"),
        ({"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "clone"},
         "dataloader_multiprocessing_context"),
        ({"curriculum": "hardest_first", "train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    ],
)  # fmt: skip
def test_a_combination_is_refused_once(settings, write_config, options, wrong):
    settings["dpo"] |= options
    _, errors = read_config(write_config(settings))
    assert [error.what for error in errors] == [f"dpo.{wrong}"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1, "num_train_epochs": 0.5},
        {"logging_steps": 0.1, "eval_steps": 0.5, "save_steps": 0.25},
        {"logging_strategy": "no", "logging_steps": 0},
        {"eval_steps": None},
        {"learning_rate": 0, "weight_decay": 0.1, "max_grad_norm": 0},
        {"warmup_steps": 0.1, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"load_best_model_at_end": True, "metric_for_best_model": "chosen_ece", "save_steps": 3},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"report_to": []},
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "group_by_length"},
    ],
)
def test_good_options_are_accepted(settings, write_config, options):
    settings["dpo"] |= options
    config = load_config(write_config(settings))
    assert all(getattr(config.dpo, key) == value or value is None for key, value in options.items())


@pytest.mark.parametrize("command", ["run", "check"])
def test_run_and_check_report_the_same(settings, write_config, capsys, command):
    settings["sft"] |= {"dataloader_num_workers": -1, "learning_rate": float("nan"), "per_device_train_batch_size": 0}
    assert main([command, str(write_config(settings))]) > 0
    printed = capsys.readouterr()
    for key in ("dataloader_num_workers", "learning_rate", "per_device_train_batch_size"):
        assert f"config.yaml: sft.{key}: expected " in printed.out + printed.err


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(("stage", "batch", "rows"), [("sft", 25, 24), ("dpo", 9, 8)])
def test_a_stage_without_a_batch_is_an_error(settings, write_config, capsys, command, stage, batch, rows):
    """Of 32 rows stage 1 takes 24 and stage 2 takes 8."""
    settings[stage] |= {"dataloader_drop_last": True, "per_device_train_batch_size": batch}
    assert main([command, str(write_config(settings))]) > 0
    printed = capsys.readouterr()
    expected = f"{stage}.dataloader_drop_last: expected false, or at least {batch} training rows in the stage"
    assert expected in printed.out + printed.err
    assert f"got true with {rows} rows" in printed.out + printed.err


def test_a_stage_with_one_full_batch_is_accepted(settings, write_config):
    settings["dpo"] |= {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    check_batches(load_config(write_config(settings)).stage("dpo"), "dpo", 8)


def test_an_access_token_is_not_pickled(tmp_path):
    args = SFTArguments(output_dir=str(tmp_path), hub_token="hf_secret", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == "hf_secret"
    assert yaml.safe_dump(dataclasses.replace(args).hub_token).startswith("hf_secret")


def test_one_mistake_in_python_is_one_error():
    with pytest.raises(InputError, match=r"^config: learning_rate: expected a finite number >= 0, got -1"):
        SFTArguments(output_dir="x", learning_rate=-1)
