"""Every option of `TrainingArguments` is classified: those that work have an effect, those that do not are refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from cwdpo_trainer.config import training_options
from cwdpo_trainer.config.loader import read_config
from cwdpo_trainer.config.stage_arguments import SFTArguments
from cwdpo_trainer.config.training_options import ACCELERATOR, OURS, PASSED_ON, REFUSED, SWITCHES, WORKS
from cwdpo_trainer.errors import InputError, InputErrors

KINDS = {"works": WORKS, "passed on": PASSED_ON, "ours": OURS, "refused": REFUSED}
INSTALLED = {spec.name for spec in dataclasses.fields(TrainingArguments)}
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than transformers 5.19
ON_CPU = {"output_dir": "unused", "use_cpu": True, "eval_strategy": "no"}

# A value other than the default for each refused option.
SET = {
    "per_device_eval_batch_size": 4,
    "eval_do_concat_batches": False,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "length_column_name": "tokens",
    "include_num_input_tokens_seen": "non_padding",
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "debug": "underflow_overflow",
    "dataloader_in_order": False,
    "resume_from_checkpoint": "checkpoint-2",
    "deepspeed": {},
    "parallelism_config": object(),
    "local_rank": 0,
}
WITHOUT_SWITCH = {
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "liger_kernel_config": {"rope": True},
    "fsdp_config": {"version": 2},
    "optim_target_modules": ["q_proj"],
    "warmup_steps": 5,
    "greater_is_better": True,
    "hub_strategy": "end",
    "hub_private_repo": True,
    "hub_always_push": True,
}


def errors_of(**options) -> dict[str, InputError]:
    """The errors by option."""
    try:
        SFTArguments(**{**ON_CPU, **options})
    except InputErrors as error:
        return {one.what: one for one in error.errors}
    except InputError as error:
        return {error.what: error}
    return {}


def test_every_option_is_in_one_kind():
    names = [name for kind in KINDS.values() for name in kind]
    assert len(names) == len(set(names))
    assert set(names) >= INSTALLED, "classify the new options in config/training_options.py"
    assert set(names) - INSTALLED <= NEWER


def test_reasons_are_given():
    assert all(len(reason) > 10 for kind in (PASSED_ON, OURS, REFUSED, ACCELERATOR) for reason in kind.values())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_is_refused_with_its_reason(name):
    (key, error), *others = errors_of(**{name: SET.get(name, True)}).items()
    assert (key, others) == (name, [])
    assert error.expected.startswith("the default, ")
    assert error.expected.endswith(f" ({REFUSED[name]})")


@pytest.mark.parametrize("name", sorted({*REFUSED, *SWITCHES}))
def test_the_default_is_accepted(name):
    if name in INSTALLED:
        assert errors_of(**{name: training_options.default_of(SFTArguments(**ON_CPU), name)}) == {}


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_an_option_without_its_switch_is_refused(name):
    options = {"lr_scheduler_type": "constant"} if name == "warmup_steps" else {}
    found = errors_of(**{name: WITHOUT_SWITCH.get(name, "mine")}, **options)
    assert list(found) == [name]
    assert f"it has no effect without {SWITCHES[name][0]}" in found[name].expected


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"push_to_hub": True, "hub_strategy": "end", "hub_private_repo": True, "hub_revision": "dev"},
        {"report_to": "trackio", "project": "mine", "trackio_space_id": "me/space", "run_name": "one"},
        {"metric_for_best_model": "chosen_ece", "greater_is_better": False},
        {"include_num_input_tokens_seen": False},
        {"accelerator_config": {"dispatch_batches": False, "non_blocking": True,
                                "gradient_accumulation_kwargs": {"sync_each_batch": True}}},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
        {"optim": "adafactor", "weight_decay": 0.1},
        {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_options_with_an_effect_are_accepted(options, monkeypatch):
    monkeypatch.setattr(
        "cwdpo_trainer.config.stage_arguments.get_available_reporting_integrations", lambda: ["trackio"]
    )
    assert errors_of(**options) == {}


def test_a_copy_of_accepted_options_is_accepted():
    accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    args = SFTArguments(**ON_CPU, accelerator_config=accumulation, activation_checkpointing=True)
    assert dataclasses.replace(dataclasses.replace(args)).activation_checkpointing


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon"),
        ({"optim_args": "momentum=0.9"}, "optim_args"),
        ({"activation_checkpointing": False, "gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_an_option_that_another_overrides_is_refused(options, wrong):
    assert list(errors_of(**options)) == [wrong]


@pytest.mark.parametrize(
    ("key", "value"),
    [("split_batches", True), ("dispatch_batches", True), ("even_batches", False), ("use_seedable_sampler", False),
     ("use_configured_state", True), ("gradient_accumulation_kwargs", {"adjust_scheduler": False})],
)  # fmt: skip
def test_keys_of_accelerator_config_that_do_not_work_are_refused(settings, write_config, key, value):
    settings["dpo"]["accelerator_config"] = {key: value}
    _, errors = read_config(write_config(settings))
    assert [error.what for error in errors] == ["dpo.accelerator_config"]
    assert key in str(errors[0])


def test_an_option_of_a_newer_library_is_refused(monkeypatch):
    @dataclass
    class Newer(TrainingArguments):
        new_option: list[str] = field(default_factory=list)

    @dataclass
    class Arguments(SFTArguments):
        new_option: list[str] = field(default_factory=list)

    monkeypatch.setattr(training_options, "TrainingArguments", Newer)
    assert Arguments(**ON_CPU).new_option == []
    with pytest.raises(InputError, match=r"new_option: expected the default, \[\] \(this version of the trainer does"):
        Arguments(**ON_CPU, new_option=["x"])
