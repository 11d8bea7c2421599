"""Benchmark of a whole CW-DPO step of the trainer on a small LLaVA, with the fused head and with full logits (CPU).

A step collates two pairs, computes their reference log-probs, runs forward and backward of the policy, and updates its
weights. The cache of reference log-probs is off, because with it only the first epoch would compute them, and every
answer has its own prompt (sharing.py measures shared ones). The two paths differ only in the two functions of the head.
The model has SmolVLM's vocabulary, 256 image tokens in every prompt, and answers of 64 tokens.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import cwdpo_kernels as ck
from benchmarks import memory, peers, timing
from cwdpo_kernels import reference
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.config.stage_arguments import DPOArguments
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.rows import Row, load_rows
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.stages import dpo

WARM_UP, MAX_STEPS = 2, 5
LOSS_TOLERANCE = 1e-4  # between the losses of the two paths
WORDS = ("red", "green", "blue", "square", "circle", "left", "right", "above")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
SAMPLING = SamplingArguments(max_new_tokens=2)


@dataclass(frozen=True)
class Shape:
    """The model and the data. image_size: in pixels; each 8 x 8 patch is a token. response: tokens per answer."""

    vocab: int = 49280
    dim: int = 256
    layers: int = 4
    image_size: int = 128
    response: int = 64
    pairs: int = 2


SHAPE = Shape()


def full_logits_logp(hidden: Tensor, head: ck.Head, labels: Tensor, cu_seqlens: None = None) -> ck.SequenceLogprob:
    """Sequence log-probs of padded rows from eager token log-probs."""
    return reference.sequence_logprob(peers.eager_logp(hidden, head, labels), labels)


def full_logits_loss(
    hidden: Tensor, head: ck.Head, labels: Tensor, *refs: Tensor, cu_seqlens: None = None, **options
) -> ck.PreferenceOutput:
    """The same loss and metrics from eager log-probs."""
    sequences = full_logits_logp(hidden, head, labels)
    pairs = labels.shape[0] // 2
    chosen, rejected = (
        ck.SequenceLogprob(*(x[part] for x in sequences)) for part in (slice(pairs), slice(pairs, None))
    )
    return ck.preference_loss(chosen, rejected, *refs, **options)


PATHS: dict[str, dict[str, Any]] = {  # the attributes of `dpo` that a path replaces
    "fused": {
        "linear_sequence_logprob": ck.linear_sequence_logprob,
        "linear_preference_loss": ck.linear_preference_loss,
    },
    "eager, full logits": {"linear_sequence_logprob": full_logits_logp, "linear_preference_loss": full_logits_loss},
}


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return {
        head: lambda repeats, call, head=head: measure(head == "trainable", repeats, call)
        for head in ("frozen", "trainable")
    }


def measure(trainable: bool, repeats: int, call: Callable, shape: Shape = SHAPE) -> dict:
    """Seconds, pairs per second and peak memory of a step with each path. Raises SystemExit if their losses differ."""
    with timing.others() as others:
        found = {path: train(path, trainable, WARM_UP + min(max(repeats, 2), MAX_STEPS), shape) for path in PATHS}
    first, second = (torch.tensor(run.losses) for run in found.values())
    if not (first - second).abs().max() <= LOSS_TOLERANCE:  # all steps, because the first loss is ln 2 for any head
        raise SystemExit(f"trainer: losses differ, nothing is reported: {first.tolist()}, {second.tolist()}")
    results = {}
    for path, run in found.items():
        results[path] = timing.summary(run.seconds[WARM_UP:])
        results[path]["pairs_per_second"] = shape.pairs / results[path]["median_seconds"]
        results[path]["extra_mib"] = call(peak, path, trainable, shape) / 2**20
    return {"workload": vars(shape), "trainable_head": trainable, "others": others(), "results": results}


def peak(path: str, trainable: bool, shape: Shape) -> int:
    """Peak bytes of a step above the memory before it, so without weights and optimizer state. Runs in a worker."""
    return train(path, trainable, WARM_UP + 1, shape).peaks[-1]


class Recorder(TrainerCallback):
    """Records for each step: its time from the end of the last one, so with data loading; loss; peak resident bytes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[int] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._last = time.perf_counter()

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        memory.reset_peak()
        self._resident = memory.status("VmRSS")

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        self.peaks.append(memory.status("VmHWM") - self._resident)

    def on_log(self, *args: object, logs: Mapping[str, float] | None = None, **kwargs: object) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def train(path: str, trainable: bool, steps: int, shape: Shape) -> Recorder:
    """`steps` steps of the real trainer with the given head path."""
    quiet = contextlib.redirect_stdout(io.StringIO())  # hides the trainer's output
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(dpo, **PATHS[path]), quiet:
        processor = build_processor(shape)
        collator = PairCollator(processor)
        rows = build_rows(Path(folder), shape)
        torch.manual_seed(0)
        policy = build_model(processor, shape)
        policy.lm_head.requires_grad_(trainable)
        args = DPOArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=shape.pairs, logging_steps=1,
            eval_strategy="no", eval_on_start=False, save_strategy="no", report_to="none", disable_tqdm=True,
            reference_cache=None,
            logp_floor=-math.log(shape.vocab),  # mean log-prob of random weights, so that w_c is near 1/2
            use_cpu=True, logging_nan_inf_filter=False,
        )  # fmt: skip
        probes = Probes(rows[:1], collator, ProbeArguments(rows=1, batch_size=1), SAMPLING, args.fixed_cooling, seed=0)
        recorder = Recorder()
        trainer = dpo.CWDPOTrainer(
            policy, copy.deepcopy(policy), args, rows, collator, probes, sampling=SAMPLING, prefix_sharing="off"
        )
        trainer.add_callback(recorder)
        trainer.train()
    return recorder


def build_processor(shape: Shape) -> LlavaProcessor:
    """A processor with a word-level tokenizer."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": shape.image_size, "width": shape.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip


def build_model(processor: LlavaProcessor, shape: Shape) -> LlavaForConditionalGeneration:
    """A model with random weights from torch's default generator."""
    ids = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=shape.image_size, patch_size=8, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.dim, intermediate_size=3 * shape.dim,
            num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
            pad_token_id=ids.pad_token_id, bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id,
        ),
        image_token_index=ids.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def build_rows(folder: Path, shape: Shape, count: int = 8) -> list[Row]:
    """Rows with answers of `response` tokens, including the end-of-sequence token."""
    Image.new("RGB", (shape.image_size, shape.image_size), (200, 30, 30)).save(folder / "picture.png")

    def answer(start: int) -> str:
        return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(shape.response - 1))

    lines = [
        {"prompt": "<image> left", "images": ["picture.png"], "chosen": answer(i), "rejected": answer(i + 3)}
        for i in range(count)
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(lines))
    return load_rows(path)
