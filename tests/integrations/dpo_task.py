"""Small preference tasks for TRL's trainers, and trainers of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from trl import DPOConfig

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations.trl import CoolingDPOTrainer

BETA = 0.3
COOLING = Cooling(logp_floor=-2.8, temperature=0.5)


class Task(NamedTuple):
    folder: Path  # of the saved model
    model: torch.nn.Module
    processor: object
    rows: Dataset


def moved(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The model with every weight perturbed: a policy that differs from its reference."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make(kind, task, model=None, *, args=None, cooling=COOLING, **options):
    args = {
        "output_dir": str(task.folder / "run"), "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "per_device_eval_batch_size": 4, "logging_steps": 1, "beta": BETA, "bf16": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3, **(args or {}),
    }  # fmt: skip
    if kind is CoolingDPOTrainer:
        options["cooling"] = cooling
    model = str(task.folder) if model is None else model
    return kind(model, args=DPOConfig(**args), train_dataset=task.rows, processing_class=task.processor, **options)


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
