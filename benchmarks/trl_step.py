"""Benchmark of a whole DPO step in TRL: its own trainer, and ours with and without shared prompts (CPU).

A step of one pair collates it, computes the log-probs of the reference (LoRA off) and the policy, the loss and its
gradients, and updates the LoRA weights of q and v. The trainers get the same model, rows and arguments:

- TRL DPOTrainer: TRL's own loss from logits
- CoolingDPOTrainer: the fused head in TRL's trainer, one row per answer
- CoolingDPOTrainer, prefix_sharing: the same with shared prompts (token trees)

`constant=1.0` makes ours plain DPO, so all three must log the same losses. `text` has a prompt of 1024 tokens, `image`
one of 1024 tokens with an image of 900. Answers have 64 tokens.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image

import cwdpo_kernels as ck
from benchmarks import sharing, timing, trainer_step
from benchmarks.sharing import Shape
from cwdpo_kernels.integrations.trl import CoolingDPOTrainer

BETA = 0.1
COOLING = ck.Cooling(constant=1.0)
TRL, SEPARATE, SHARED = "TRL DPOTrainer", "CoolingDPOTrainer", "CoolingDPOTrainer, prefix_sharing"
WAYS: dict[str, Callable[..., trl.DPOTrainer]] = {
    TRL: trl.DPOTrainer,
    SEPARATE: functools.partial(CoolingDPOTrainer, cooling=COOLING),
    SHARED: functools.partial(CoolingDPOTrainer, cooling=COOLING, prefix_sharing=True),
}
WARM_UP, STEPS, MAX_ROUNDS = 1, 2, 3  # steps of each way in a round, and rounds
LOSS_TOLERANCE = 1e-4  # largest difference from TRL's losses


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    shapes = {"text": Shape(1024), "image": Shape(1024, patches=30)}
    return {name: functools.partial(measure, shape) for name, shape in shapes.items()}


def measure(shape: Shape, repeats: int, call: Callable) -> dict:
    """Seconds and peak memory of a step in each way. Raises SystemExit if their losses differ."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = {}
    with timing.others() as others:
        for _ in range(min(repeats, MAX_ROUNDS)):
            for way in WAYS:
                found = train(shape, way, WARM_UP + STEPS)
                times[way] += found.seconds[WARM_UP:]
                losses[way] = torch.tensor(found.losses)
    for way in WAYS:
        if not (losses[way] - losses[TRL]).abs().max() <= LOSS_TOLERANCE:
            raise SystemExit(f"trl: losses differ, nothing is reported: {losses}")
    results = {way: timing.summary(seconds) for way, seconds in times.items()}
    for way in WAYS:
        results[way]["extra_mib"] = call(peak, shape, way) / 2**20
    ratios = {
        way: {key: results[way][key] / results[TRL][key] for key in ("median_seconds", "extra_mib")}
        for way in (SEPARATE, SHARED)
    }
    return {"workload": vars(shape), "others": others(), "results": results, "to_trl": ratios}


def peak(shape: Shape, way: str) -> int:
    """Peak bytes of a step above the memory before it, which holds weights and optimizer state. Runs in a worker."""
    return train(shape, way, WARM_UP + 1).peaks[-1]


def train(shape: Shape, way: str, steps: int) -> trainer_step.Recorder:
    """Seconds, peak bytes and losses of the first `steps` steps of a new trainer."""
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # TRL 1.16 uses names that transformers has renamed
        args = trl.DPOConfig(
            folder, max_steps=steps, per_device_train_batch_size=1, logging_steps=1, learning_rate=1e-2, beta=BETA,
            max_length=None, gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        processor = trainer_step.build_processor(trainer_step.Shape(image_size=8 * max(shape.patches, 1)))
        tokenizer = processor.tokenizer
        torch.manual_seed(0)
        trainer = WAYS[way](
            build_model(shape, tokenizer.convert_tokens_to_ids("<image>")), args=args,
            train_dataset=build_rows(shape), processing_class=processor if shape.patches else tokenizer,
            peft_config=LoraConfig(r=8, target_modules=r".*\.layers\..*self_attn\.(q|v)_proj"),
        )  # fmt: skip
        recorder = trainer_step.Recorder()
        trainer.add_callback(recorder)
        trainer.train()
    return recorder


def build_model(shape: Shape, image: int) -> Any:
    """The model of benchmarks.sharing, with `image` as the id of the image placeholder."""
    model: Any = sharing.build_model(shape)
    if shape.patches:
        model.config.image_token_id = image
    return model


def build_rows(shape: Shape, count: int = 8) -> Dataset:
    """Rows of random words and images. Every word is a token, and TRL appends one to each answer."""
    generator = random.Random(0)

    def words(count: int) -> str:
        return "".join(f" {word}" for word in generator.choices(trainer_step.WORDS, k=count))

    rows = []
    for _ in range(count):
        chosen, rejected = words(shape.answer - 1), words(shape.answer - 1)
        row: dict[str, Any] = {"prompt": words(shape.prompt), "chosen": chosen, "rejected": rejected}
        if shape.patches:
            size = (8 * shape.patches, 8 * shape.patches)
            row["prompt"] = "<image>" + words(shape.prompt - shape.patches**2)
            row["images"] = [Image.frombytes("RGB", size, generator.randbytes(3 * size[0] * size[1]))]
        rows.append(row)
    return Dataset.from_list(rows)
