"""Values of `transformers.TrainingArguments` that the library accepts and that then break or spoil the training.

`check_training` has the rules that need no more than the values. `try_training` makes the optimizer, the schedule and
the other objects that the library makes of the options, so that what it refuses is known before a run.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import ParallelMode, trainer_log_levels
from transformers.utils import is_liger_kernel_available

from cwdpo_trainer.config.checks import Checks, is_finite, one_of
from cwdpo_trainer.config.training_options import check_accelerator_config, check_supported, default_of, is_default
from cwdpo_trainer.errors import require

STEPS = 100  # of the schedule that is tried
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# `batch_rebalance` of the library measures lengths of rows of tokens, which this trainer's rows are not.
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
CHECKPOINTED_BY_LIBRARY = {"every_n_layers", "offload"}  # these options torch does not get
OPTIMIZER_OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")

Rule = tuple[str, Callable[[Any], bool]]
AT_LEAST_1: Rule = ("an integer >= 1", lambda value: value >= 1)
AT_LEAST_0: Rule = ("an integer >= 0", lambda value: value >= 0)
NOT_NEGATIVE: Rule = ("a finite number >= 0", lambda value: is_finite(value) and value >= 0)
POSITIVE: Rule = ("a finite number > 0", lambda value: is_finite(value) and value > 0)
BELOW_1: Rule = ("a number in [0, 1)", lambda value: 0 <= value < 1)
INTERVAL = "a number of steps >= 1, or a fraction of the stage in (0, 1)"


def _or_null(rule: Rule) -> Rule:
    expected, holds = rule
    return f"null or {expected}", lambda value: value is None or holds(value)


def _choice(names: tuple[str, ...]) -> Rule:
    return one_of(names), lambda value: value in names


RULES: dict[str, Rule] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "num_train_epochs": POSITIVE,
    "max_steps": ("an integer >= 1, or -1 to train num_train_epochs", lambda value: value == -1 or value >= 1),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": POSITIVE,  # with 0, a weight whose gradient is 0 becomes NaN
    "max_grad_norm": ("a number >= 0 (0 turns clipping off)", lambda value: value >= 0),
    "neftune_noise_alpha": _or_null(NOT_NEGATIVE),
    "torch_empty_cache_steps": _or_null(AT_LEAST_1),
    "torch_compile_mode": _or_null(_choice(COMPILE_MODES)),
    "eval_delay": NOT_NEGATIVE,
    "log_level": _choice(tuple(trainer_log_levels)),
    "log_level_replica": _choice(tuple(trainer_log_levels)),
    "train_sampling_strategy": _choice(SAMPLING_STRATEGIES),
    "dataloader_num_workers": AT_LEAST_0,
    "dataloader_prefetch_factor": _or_null(AT_LEAST_1),
    "ddp_bucket_cap_mb": _or_null(AT_LEAST_1),
    "ddp_timeout": AT_LEAST_1,
    # With a limit of 1 the library deletes the last checkpoint at the end of training unless it is the best one. A kill
    # before the model is saved would then lose all steps since the best checkpoint.
    "save_total_limit": _or_null(("an integer >= 2", lambda value: value >= 2)),
}


def check_training(args: TrainingArguments, checks: Checks) -> None:
    """Check the options before the library converts them."""
    for key, (expected, holds) in RULES.items():
        if hasattr(args, key):  # older versions of transformers lack some
            checks(holds(getattr(args, key)), key, expected, getattr(args, key))
    check_supported(args, checks)
    without = args.gradient_checkpointing and getattr(args, "activation_checkpointing", None) is False
    checks(not without, "gradient_checkpointing", "false, as activation_checkpointing is false", True)
    for what in ("logging", "eval", "save"):
        steps = getattr(args, f"{what}_steps")
        unset = what == "eval" and steps in (None, 0)  # the library takes logging_steps
        if getattr(args, f"{what}_strategy") == "steps" and not unset:
            checks(_is_interval(steps), f"{what}_steps", INTERVAL, steps)
    _check_workers(args, checks)
    _check_metric(args, checks)


def check_batches(args: TrainingArguments, stage: str, rows: int) -> None:
    """Raise `InputError` if `dataloader_drop_last` leaves a stage of `rows` pairs without a batch.

    The library would make no step and save the untrained model. Without the option every stage has a batch.
    """
    batch = args.train_batch_size * args.world_size
    enough = not args.dataloader_drop_last or rows >= batch
    expected = f"false, or at least {batch} training rows in the stage (a batch of all processes)"
    require(enough, "config", f"{stage}.dataloader_drop_last", expected, f"true with {rows} rows")


def _is_interval(steps: float) -> bool:
    return is_finite(steps) and (0 < steps < 1 or (steps >= 1 and steps == math.floor(steps)))


def _check_workers(args: TrainingArguments, checks: Checks) -> None:
    """Options of the processes that load data need such processes."""
    if args.dataloader_num_workers != 0:
        return
    without = {"prefetch_factor": None, "persistent_workers": False, "multiprocessing_context": None}
    for name, default in without.items():
        value = getattr(args, f"dataloader_{name}", default)
        expected = f"{'null' if default is None else 'false'}, as dataloader_num_workers is 0"
        checks(checks.found(f"dataloader_{name}") or value == default, f"dataloader_{name}", expected, value)


def _check_metric(args: TrainingArguments, checks: Checks) -> None:
    """Options that follow a metric need its name, and probes that measure it."""
    following = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy": args.save_strategy == "best",
        "lr_scheduler_type": args.lr_scheduler_type in METRIC_SCHEDULES,
        "early_stopping_patience": getattr(args, "early_stopping_patience", None) is not None,
    }
    users = [key for key, is_set in following.items() if is_set]
    for key in users[:1]:
        expected = f"the name of a probe metric, as {key} is set"
        checks(args.metric_for_best_model is not None, "metric_for_best_model", expected, None)
        checks(args.eval_strategy != "no", "eval_strategy", f"steps or epoch, as {key} is set", args.eval_strategy)


def try_training(args: TrainingArguments) -> None:
    """Make of the options what the library makes of them before its first step. Raises whatever it raises."""
    _try_optimizer(args)
    with warnings.catch_warnings(action="ignore"):  # more workers than cores
        DataLoader(
            TensorDataset(torch.zeros(1)), args.per_device_train_batch_size, num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor, persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )  # fmt: skip
    checks = Checks()
    _check_accelerator(args, checks)
    _check_optimizer_options(args, checks)
    checks.done()
    if args.torch_compile:
        TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    if args.gradient_checkpointing_kwargs:  # the name that all versions of the library read
        options = set(inspect.signature(checkpoint).parameters) | {"preserve_rng_state"} | CHECKPOINTED_BY_LIBRARY
        unknown = set(args.gradient_checkpointing_kwargs) - (options - {"function", "args", "kwargs"})
        if unknown:
            raise TypeError(f"torch.utils.checkpoint has no option {', '.join(sorted(unknown))}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("liger-kernel is not installed (pip install liger-kernel)")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError("FSDP needs several processes (accelerate launch)")


def _try_optimizer(args: TrainingArguments) -> None:
    if args.optim_target_modules is not None:  # such an optimizer needs the modules of the model
        return
    model: Any = torch.nn.ParameterList([torch.zeros(1, 1)])  # takes no random numbers
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    schedule_options: Any = args.lr_scheduler_kwargs
    optimizer = kind(model.parameters(), **options)
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        args.get_warmup_steps(STEPS),
        STEPS,
        scheduler_specific_kwargs=schedule_options,
    )


def _check_accelerator(args: TrainingArguments, checks: Checks) -> None:
    config: Any = args.accelerator_config  # the library has read a file
    check_accelerator_config(config, checks)
    accumulation = config.gradient_accumulation_kwargs or {}
    unknown = sorted(accumulation.keys() - {"sync_each_batch"})
    expected = "gradient_accumulation_kwargs with sync_each_batch only (gradient_accumulation_steps has the number)"
    checks(not unknown, "accelerator_config", expected, ", ".join(unknown))


def _check_optimizer_options(args: TrainingArguments, checks: Checks) -> None:
    """Note the options that the optimizer ignores: without them it would be made in the same way."""
    if args.optim_target_modules is not None:
        return
    model: Any = torch.nn.ParameterList([torch.zeros(1, 1)])
    optimizer: Any = args.optim
    made = Trainer.get_optimizer_cls_and_kwargs(args, model)
    for name in OPTIMIZER_OPTIONS:
        for others in _without_option(args, name):
            ignored = Trainer.get_optimizer_cls_and_kwargs(others, model) == made
            expected = f"options that the optimizer {optimizer.value} does not ignore"
            checks(not ignored, name, expected, getattr(args, name))


def _without_option(args: TrainingArguments, name: str) -> list[TrainingArguments]:
    """Copies of `args`, each without one of the settings in the option `name`. Of a default there are none."""
    if is_default(args, name):
        return []
    if name != "optim_args":
        return [_changed(args, name, default_of(args, name))]
    settings = (args.optim_args or "").split(",")
    rest = (",".join(settings[:index] + settings[index + 1 :]) for index in range(len(settings)))
    return [_changed(args, name, value or None) for value in rest]


def _changed(args: TrainingArguments, name: str, value: Any) -> TrainingArguments:
    changed = copy.copy(args)
    setattr(changed, name, value)
    return changed
