"""Options of `TrainingArguments` that work: the tiny model trains with values other than the defaults.

Those that other tests set are listed in `ELSEWHERE`, with the test.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from cwdpo_kernels import Cooling
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.config.stage_arguments import SFTArguments
from cwdpo_trainer.config.training_options import WORKS
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer

OPTIONS = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2,
           "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "disable_tqdm": True,
           "use_cpu": True}  # fmt: skip
TESTS = Path(__file__).parent

ELSEWHERE = {
    "test_stopping.py": {
        "metric_for_best_model",
        "greater_is_better",
        "load_best_model_at_end",
    },
    "test_stages.py": {"train_sampling_strategy"},
    "test_trackers.py": {"report_to"},
    "test_card.py": {"push_to_hub", "hub_token", "hub_model_id", "hub_strategy"},
}


@pytest.fixture
def train(model, collator, rows, tmp_path):
    """Trains a fresh copy of the tiny model, 16 pairs, and returns the trainer."""

    def train(resume: int | None = None, **options):
        policy, reference = copy.deepcopy(model), copy.deepcopy(model)
        probes = Probes(rows, collator, ProbeArguments(rows=2), SamplingArguments(max_new_tokens=3), Cooling(), seed=0)
        args = SFTArguments(**{"output_dir": str(tmp_path / "stage"), **OPTIONS, **options})
        trainer = ConstrainedSFTTrainer(policy, reference, args, rows[:16], collator, probes)
        trainer.train(None if resume is None else str(tmp_path / "stage" / f"checkpoint-{resume}"))
        return trainer

    return train


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def losses(trainer) -> list[float]:
    return logged(trainer, "loss")


def steps(trainer, name: str) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


def saved(trainer) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.fixture
def plain(train) -> list[float]:
    return losses(train())


def test_every_option_that_works_is_tried():
    text = {path.name: path.read_text() for path in TESTS.glob("test_*.py")}
    for file, names in ELSEWHERE.items():
        assert all(name in text[file] for name in names), file
    here = text[Path(__file__).name].partition("def test_every_option")[2]
    elsewhere = set().union(*ELSEWHERE.values())
    assert {name for name in WORKS if f"{name}=" not in here and f'"{name}"' not in here} == elsewhere


def test_batches_and_epochs(train):
    trainer = train(max_steps=-1, num_train_epochs=1.5, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert trainer.state.global_step == 6  # 1.5 epochs of 16 pairs, 4 a step
    assert train(max_steps=3).state.global_step == 3
    full = train(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=5, dataloader_drop_last=True)
    assert full.state.global_step == 3


def test_a_step_of_accumulated_batches_is_one_of_a_larger_batch(train, plain):
    accumulated = losses(train(per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert accumulated == pytest.approx(plain, rel=1e-3)


def test_options_that_stages_share_are_not_changed(train):
    """As with an anchor in YAML. The library adds num_steps to them, and refuses it then."""
    shared = {"sync_each_batch": True}
    for _ in range(2):
        train(max_steps=1, gradient_accumulation_steps=2, accelerator_config={"gradient_accumulation_kwargs": shared})
    assert shared == {"sync_each_batch": True}


def test_schedule_and_warm_up(train):
    trainer = train(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 4e-3}, warmup_steps=1)
    rates = logged(trainer, "learning_rate")
    expected = [0, *(4e-3 + 3e-3 * (1 + math.cos(math.pi * step / 3)) for step in range(3))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"weight_decay": 0.9},
        {"adam_beta1": 0.1},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1.0},
        {"max_grad_norm": 1e-7},
        {"learning_rate": 2e-2},
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_that_change_the_training(train, plain, options):
    changed = losses(train(**options))
    assert all(map(math.isfinite, changed))
    assert changed != plain


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 1}},
    ],
    ids=["new names", "old names"],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_checkpointed_activations(train, plain, options):
    trainer = train(**options)
    assert losses(trainer) == pytest.approx(plain, rel=1e-4)
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


def test_workers_load_the_same_batches(train, plain):
    trainer = train(dataloader_num_workers=2, dataloader_persistent_workers=True, dataloader_prefetch_factor=3,
                    dataloader_multiprocessing_context="fork")  # fmt: skip
    assert losses(trainer) == plain
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)
    assert loader.multiprocessing_context.get_start_method() == "fork"


def test_full_determinism(train, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "1")  # the library sets them: restore them after the test
    try:
        assert len(losses(train(full_determinism=True))) == 4
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_logging(train):
    level = logging.get_verbosity()
    try:
        trainer = train(logging_steps=3, logging_first_step=True, log_level="error", skip_memory_metrics=False)
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(level)
    assert steps(trainer, "loss") == [1, 3]
    assert logged(trainer, "train_mem_cpu_alloc_delta")
    assert steps(train(logging_strategy="epoch", max_steps=8), "loss") == [4, 8]
    bars = train(disable_tqdm=False).callback_handler.callbacks
    assert any(isinstance(callback, ProgressCallback) for callback in bars)


def test_probes(train):
    assert steps(train(eval_strategy="steps", eval_steps=1, eval_delay=3), "eval_chosen_logp") == [3, 4]
    assert steps(train(eval_on_start=True), "eval_chosen_logp") == [0, 4]


def test_checkpoints(train):
    assert saved(train(save_strategy="steps", save_steps=2, save_total_limit=None)) == [2, 4]
    assert saved(train(save_strategy="steps", save_steps=1, save_total_limit=3)) == [2, 3, 4]


def test_resume(train, plain):
    """`ignore_data_skip` starts the epoch's data again, so that the steps see other pairs."""
    assert losses(train(save_strategy="steps", save_steps=2)) == plain
    exact = train(resume=2)
    again = train(resume=2, ignore_data_skip=True, restore_callback_states_from_checkpoint=False)
    assert losses(exact) == plain
    assert losses(again)[:2] == plain[:2]
    assert losses(again)[2:] != plain[2:]


def test_use_cpu(train):
    assert train(use_cpu=True).model.device.type == "cpu"
