"""Benchmark of a CW-DPO step with shared prompts, against one with a copy of the prompt for each answer (CPU).

A step computes the log-probs of reference and policy, the loss and its gradients. The policy trains q and v of every
layer of its language model; the reference has the same weights. The step runs in two ways (`WAYS`):

- separate: one padded row per answer, as preference trainers do it; k rejected answers are k pairs
- shared: token trees (cwdpo_kernels.integrations.shared_prefix), and features of a frozen vision tower computed once

The measurements `ratio/*` vary the lengths of prompt and answers of one pair, `answers/*` the number of rejected
answers to one prompt. `image` is one pair with an image of 900 tokens in a prompt of 1024.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import cwdpo_kernels as ck
from benchmarks import memory, timing
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_kernels.integrations.shared_images import ImageFeatures
from cwdpo_kernels.integrations.shared_prefix import enable_trees, token_tree, tree_batch

IMAGE = 5  # id of the image placeholder
COOLING = ck.Cooling(logp_floor=-11.0)
TOLERANCE = 1e-4  # largest difference between the gradients of the two ways, relative to the largest entry
WAYS = ("separate", "shared")
SECONDS = 40.0  # stop repeating a way after this time; single steps vary by 10 %


@dataclass(frozen=True)
class Shape:
    """Sizes of model and batch. `prompt`, `answer`: tokens of the prompt and of each answer. `rejected`: rejected
    answers to the prompt. `patches`: along an image's side, so patches^2 image tokens; 0 for text only. `groups`:
    key-value heads."""

    prompt: int
    answer: int = 64
    rejected: int = 1
    patches: int = 0
    vocab: int = 49152
    dim: int = 576
    layers: int = 8
    heads: int = 9
    groups: int = 3
    dtype: str = "float32"


RATIOS = {"1:4": (32, 128), "1:1": (64, 64), "4:1": (256, 64), "8:1": (512, 64), "16:1": (1024, 64)}
ANSWERS = (1, 2, 4, 8)


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    shapes = {f"ratio/{name}": Shape(prompt, answer) for name, (prompt, answer) in RATIOS.items()}
    shapes |= {f"answers/{count}": Shape(256, rejected=count) for count in ANSWERS}
    shapes["image"] = Shape(1024, patches=30)
    return {name: functools.partial(measure, shape) for name, shape in shapes.items()}


def measure(shape: Shape, repeats: int, call: Callable) -> dict:
    """Seconds and peak memory of a step in both ways. Raises SystemExit if their gradients differ."""
    setup = Setup(shape)
    check_equal(setup)
    with timing.others() as others:
        times = timing.interleaved(
            {way: functools.partial(timing.seconds, functools.partial(setup.step, way)) for way in WAYS},
            repeats,
            enough=SECONDS,
        )
    results = {way: timing.summary(seconds) for way, seconds in times.items()}
    for way in WAYS:
        results[way]["extra_mib"] = call(peak, shape, way) / 2**20
    ratio = {key: results["shared"][key] / results["separate"][key] for key in ("median_seconds", "extra_mib")}
    return {"workload": vars(shape), "others": others(), "results": results, "shared_to_separate": ratio}


def peak(shape: Shape, way: str) -> int:
    """Peak bytes of a step above the loaded model and its gradients. Runs in a worker."""

    def step(setup: Setup) -> list[Tensor]:
        setup.step(way)
        return setup.gradients()

    def make() -> Setup:
        setup = Setup(shape)
        setup.step(way)  # features are shared from the second step on
        setup.model.zero_grad()
        return setup

    return memory.extra_bytes(make, step)


class Setup:
    """A model, and a batch of one prompt with its chosen and rejected answers."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.model = build_model(shape).to(getattr(torch, shape.dtype))
        attach_head(self.model)
        enable_trees(self.model)
        self.features = ImageFeatures(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("vision" not in name and ("q_proj" in name or "v_proj" in name))
        image = torch.full((1, shape.patches**2), IMAGE)
        ids = torch.cat([image, torch.randint(10, shape.vocab, (1, shape.prompt - shape.patches**2))], 1)
        self.prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if shape.patches:
            self.prompts["pixel_values"] = torch.rand(1, 3, 8 * shape.patches, 8 * shape.patches)
        answers = torch.randint(10, shape.vocab, (1 + shape.rejected, shape.answer)).tolist()
        self.chosen, self.rejected = answers[0], answers[1:]

    def step(self, way: str) -> Tensor:
        """Forward and backward; returns the loss."""
        self.model.zero_grad()
        logp = {"separate": self.separate_logp, "shared": self.shared_logp}[way]
        with self.features.once():
            with torch.no_grad():
                ref_chosen, ref_rejected = logp()
            chosen, rejected = logp()
        loss = ck.cwdpo_loss(chosen, rejected, ref_chosen.total, ref_rejected.total, beta=0.1, cooling=COOLING).loss
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def separate_logp(self) -> list[ck.SequenceLogprob]:
        """The log-probs of k chosen and k rejected answers, a row each."""
        count = len(self.rejected)
        answers = torch.tensor([self.chosen] * count + self.rejected)
        rows = {key: value.repeat(2 * count, *(1,) * (value.dim() - 1)) for key, value in self.prompts.items()}
        unlabeled = torch.full_like(rows["input_ids"], ck.IGNORE_INDEX)
        labels = ck.shift_labels(torch.cat([unlabeled, answers], 1))
        rows["input_ids"] = torch.cat([rows["input_ids"], answers], 1)
        rows["attention_mask"] = torch.ones_like(rows["input_ids"])
        logp = self.model(**rows, head_op=lambda hidden, head: ck.linear_sequence_logprob(hidden, head, labels))
        return [ck.SequenceLogprob(*(part[rows] for part in logp)) for rows in (slice(count), slice(count, None))]

    def shared_logp(self) -> list[ck.SequenceLogprob]:
        """The same from one tree, whose chosen answer is part of all k pairs."""
        batch = tree_batch(self.model, self.prompts, [[self.chosen], *([tokens] for tokens in self.rejected)])
        with token_tree(batch.tree):
            logp = self.model(
                **batch.inputs,
                head_op=lambda hidden, head: ck.linear_sequence_logprob(
                    batch.packed(hidden), head, batch.labels, batch.cu_seqlens
                ),
            )
        count = len(self.rejected)
        chosen = ck.SequenceLogprob(*(part[:1].expand(count) for part in logp))
        return [chosen, ck.SequenceLogprob(*(part[1:] for part in logp))]


def check_equal(setup: Setup, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the gradients of the two ways, relative to the largest entry.

    Raises SystemExit if it is above `tolerance`. The first two steps of each way also warm up.
    """
    found = {}
    for way in (*WAYS, *WAYS):
        setup.step(way)
        found[way] = [grad.clone() for grad in setup.gradients()]
    largest = max(grad.abs().max().item() for grad in found["separate"])
    worst = max((a - b).abs().max().item() for a, b in zip(*found.values(), strict=True))
    if not worst <= tolerance * largest:
        raise SystemExit(f"sharing: gradients differ by {worst:.2g} (largest {largest:.2g}), nothing is reported")
    return worst / largest


def build_model(shape: Shape) -> nn.Module:
    text = hf.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.dim, intermediate_size=8 * shape.dim // 3,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        max_position_embeddings=max(4096, shape.prompt + shape.answer), tie_word_embeddings=True,
    )  # fmt: skip
    if not shape.patches:
        return hf.LlamaForCausalLM(text)
    options: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    vision = hf.CLIPVisionConfig(
        **options, num_attention_heads=4, image_size=8 * shape.patches, patch_size=8, projection_dim=256
    )
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    )
