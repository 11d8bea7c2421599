"""What becomes of each option of `transformers.TrainingArguments` in a stage. This file is the only list of them.

- `WORKS`: it has the effect that the library describes, and tests see it (tests/trainer/test_option_effects.py).
- `PASSED_ON`: handed to the library as it is. The text says why no test here can see the effect.
- `OURS`: the trainer or a top-level key sets it.
- `REFUSED`: an error if it is not at its default. The text says why, and what to use instead.

An option of another version of transformers that is in none of them is refused too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from cwdpo_trainer.config.checks import Checks

WORKS = frozenset({
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "bf16", "use_cpu", "full_determinism", "neftune_noise_alpha",
    "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # the names before transformers 5.23
    "logging_strategy", "logging_steps", "logging_first_step", "log_level", "disable_tqdm", "report_to",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "save_strategy", "save_steps", "save_total_limit", "ignore_data_skip", "restore_callback_states_from_checkpoint",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "train_sampling_strategy", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "skip_memory_metrics", "push_to_hub", "hub_token", "hub_model_id", "hub_strategy",
})  # fmt: skip

_GPU = "it acts on GPUs only"
_PROCESSES = "it acts in runs of several processes only"
_NODES = "it acts in runs of several nodes only"
_TRACKIO = "it needs the package trackio"
_HUB = "it acts on uploads to the Hub only, which the tests replace"
_COMPILER = "it needs minutes of compilation"

PASSED_ON = {
    "fp16": _GPU,
    "tf32": _GPU,
    "torch_empty_cache_steps": _GPU,
    "dataloader_pin_memory": _GPU,
    "accelerator_config": "what ACCELERATOR does not refuse of it acts on GPUs or in runs of several processes only",
    "torch_compile": _COMPILER,
    "torch_compile_backend": _COMPILER,
    "torch_compile_mode": _COMPILER,
    "use_liger_kernel": "its kernels run on GPUs only",
    "liger_kernel_config": "its kernels run on GPUs only",
    "optim_target_modules": "it needs the packages galore_torch or apollo_torch",
    "ddp_find_unused_parameters": _PROCESSES,
    "ddp_bucket_cap_mb": _PROCESSES,
    "ddp_broadcast_buffers": _PROCESSES,
    "ddp_static_graph": _PROCESSES,
    "ddp_backend": _PROCESSES,
    "ddp_timeout": _PROCESSES,
    "fsdp": f"{_PROCESSES}: see test_distributed_runs.py",
    "fsdp_config": f"{_PROCESSES}: see test_distributed_runs.py",
    "log_level_replica": _PROCESSES,
    "log_on_each_node": _NODES,
    "run_name": "the packages of the trackers read it",
    "project": _TRACKIO,
    "trackio_space_id": _TRACKIO,
    "trackio_bucket_id": _TRACKIO,
    "trackio_static_space_id": _TRACKIO,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

OURS = {
    "output_dir": "a key of the top level",
    "seed": "a key of the top level",
    "data_seed": "the seed of the run orders the rows",
    "remove_unused_columns": "rows have no columns of the model's",
    "do_train": "the commands train",
    "do_eval": "eval_strategy says whether a stage is probed",
    "do_predict": "the commands predict nothing",
}

_PROBES = "the probes measure the model, and do not use it"

REFUSED = {
    "per_device_eval_batch_size": "set probes.batch_size",
    "prediction_loss_only": _PROBES,
    "eval_do_concat_batches": _PROBES,
    "eval_use_gather_object": _PROBES,
    "eval_accumulation_steps": f"{_PROBES}: if memory is short, lower probes.batch_size",
    "include_for_metrics": _PROBES,
    "batch_eval_metrics": _PROBES,
    "bf16_full_eval": "probes run in the precision of training: set bf16, or model.dtype",
    "fp16_full_eval": "probes run in the precision of training: set fp16, or model.dtype",
    "label_names": "the labels are the tokens of chosen and rejected",
    "length_column_name": "group_by_length measures the rows itself",
    "include_num_input_tokens_seen": "tokens are not counted in batches of pairs",
    "average_tokens_across_devices": "the loss is the mean over the pairs of all devices",
    "label_smoothing_factor": "for rejected answers in stage 1, set negatives: smoothed and smoothing",
    "use_cache": "training does not use a cache of keys and values, and sampling always does",
    "logging_nan_inf_filter": "a stage stops at a loss that is not finite",
    "auto_find_batch_size": "set per_device_train_batch_size and gradient_accumulation_steps: a start in the middle of "
                            "a stage with smaller batches would not be the same training",
    "debug": "a stage stops at a loss, a gradient or a weight that is not finite, and names it",
    "dataloader_in_order": "a resumed stage continues in the order of the one that was killed",
    "save_only_model": "a stage must be able to resume",
    "resume_from_checkpoint": "a run resumes by itself from the checkpoints of its output_dir",
    "enable_jit_checkpoint": "set save_steps: a stage that is stopped this way would count as finished",
    "save_on_each_node": "the nodes of a run share its output_dir",
    "deepspeed": "the trainer shards models with fsdp",
    "parallelism_config": "the trainer shards models with fsdp",
    "local_rank": "accelerate launch sets the rank of each process",
}  # fmt: skip

UNKNOWN = "this version of the trainer does not know the option"

# Keys of `accelerator_config` that are refused in the same way.
ACCELERATOR = {
    "split_batches": "per_device_train_batch_size counts the pairs of one process",
    "dispatch_batches": "every process loads its own pairs",
    "even_batches": "all processes take part in every step",
    "use_seedable_sampler": "a resumed stage continues in the order of the one that was killed",
    "use_configured_state": "the options of the stage set precision and devices",
}

Switch = tuple[str, Callable[[Any], bool]]
_CHECKPOINTING: Switch = (
    "activation_checkpointing",
    lambda args: bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing),
)
_HUB_UPLOADS: Switch = ("push_to_hub", lambda args: args.push_to_hub)
_TRACKERS: Switch = ("report_to", lambda args: args.report_to not in ("none", [], ["none"]))
_TO_TRACKIO: Switch = ("report_to: trackio", lambda args: _reports_to_trackio(args))

# Options that do nothing without another one: which one, and whether it is on.
SWITCHES: dict[str, Switch] = {
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "liger_kernel_config": ("use_liger_kernel", lambda args: args.use_liger_kernel),
    "fsdp_config": ("fsdp", lambda args: bool(args.fsdp)),
    "optim_target_modules": ("a GaLore or APOLLO optim", lambda args: args.optim.startswith(("galore", "apollo"))),
    "warmup_steps": (
        "an lr_scheduler_type with a warm-up, such as constant_with_warmup",
        lambda args: args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy"),
    ),
    "greater_is_better": ("metric_for_best_model", lambda args: args.metric_for_best_model is not None),
    "run_name": _TRACKERS,
    "project": _TO_TRACKIO,
    "trackio_space_id": _TO_TRACKIO,
    "trackio_bucket_id": _TO_TRACKIO,
    "trackio_static_space_id": _TO_TRACKIO,
    "hub_model_id": _HUB_UPLOADS,
    "hub_strategy": _HUB_UPLOADS,
    "hub_private_repo": ("push_to_hub", lambda args: args.push_to_hub or _reports_to_trackio(args)),
    "hub_always_push": _HUB_UPLOADS,
    "hub_revision": _HUB_UPLOADS,
}


def check_supported(args: TrainingArguments, checks: Checks) -> None:
    """Note the options that are set and that the stage would ignore, or that would spoil the training."""
    for spec in dataclasses.fields(TrainingArguments):
        reason = REFUSED.get(spec.name, None if is_known(spec.name) else UNKNOWN)
        if reason is not None:
            _check_default(args, spec.name, reason, checks)
    if isinstance(args.accelerator_config, dict):  # the library changes it
        check_accelerator_config(args.accelerator_config, checks)
    for name, (switch, is_on) in SWITCHES.items():
        if hasattr(args, name) and not is_on(args):  # older versions of transformers lack some
            _check_default(args, name, f"it has no effect without {switch}", checks)


def check_accelerator_config(config: dict[str, Any] | AcceleratorConfig, checks: Checks) -> None:
    """Note the keys of `accelerator_config` that are set and refused."""
    given = config if isinstance(config, dict) else vars(config)
    for key, reason in ACCELERATOR.items():
        default = getattr(AcceleratorConfig(), key)
        value = given.get(key, default)
        expected = f"{key} to be {_shown(default)} ({reason})"
        checks(value == default or (default is None and value is False), "accelerator_config", expected, value)


def is_known(name: str) -> bool:
    return any(name in kind for kind in (WORKS, PASSED_ON, OURS, REFUSED))


def default_of(args: TrainingArguments, name: str) -> Any:
    """The default of an option in the class of `args`."""
    spec = type(args).__dataclass_fields__[name]
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def is_default(args: TrainingArguments, name: str) -> bool:
    """Whether an option has its default, or the value that the library converts its default to."""
    value, default = getattr(args, name), default_of(args, name)
    return value == default or (_is_off(value) and _is_off(default))


def _check_default(args: TrainingArguments, name: str, reason: str, checks: Checks) -> None:
    expected = f"the default, {_shown(default_of(args, name))} ({reason})"
    checks(is_default(args, name), name, expected, getattr(args, name))


def _is_off(value: Any) -> bool:
    return value is False or value in ("no", "") or value == []


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    return json.dumps(value)


def _reports_to_trackio(args: TrainingArguments) -> bool:
    report_to = args.report_to
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return "trackio" in names or "all" in names
