"""The shapes of a DPO step on published vision-language models, and the workloads for a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import cwdpo_kernels as ck
from benchmarks.models import MODELS
from cwdpo_kernels.testing import make_inputs

# Log-probs without a gradient; forward and backward with a frozen head; the same with a trainable head.
MODES = ("no_grad", "frozen", "trainable")
REFERENCE_LOGP = -12.0  # nats per token of every answer, about what random heads give
QUESTION = 64  # text tokens in a prompt
RESPONSES = (64, 256, 1024, 4096)
PAIRS = (1, 2, 4, 8)


class Inputs(NamedTuple):
    """hidden [2P, T, D], head, aligned labels [2P, T], reference log-probs of the answers [2, P] in nats."""

    hidden: Tensor
    head: ck.Head
    labels: Tensor
    refs: Tensor


@dataclass(frozen=True)
class Workload:
    """P pairs of T tokens, of which the last `response` are labeled."""

    name: str
    pairs: int
    tokens: int
    response: int
    vocab: int
    dim: int
    dtype: torch.dtype = torch.float32
    all_tokens: bool = True  # also run implementations that project all 2PT tokens

    @classmethod
    def of(cls, model: str, pairs: int, response: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
        """An image, a question and an answer of `response` tokens, for the named model."""
        shape = MODELS[model]
        tokens = shape.image_tokens + QUESTION + response
        return cls(f"{model}, {pairs} x {response}", pairs, tokens, response, shape.vocab, shape.dim, dtype)

    @property
    def labeled(self) -> int:
        return 2 * self.pairs * self.response

    def make(self, mode: str) -> Inputs:
        """The inputs on the default device. `mode` decides which of them require a gradient."""
        shape = (2 * self.pairs, self.tokens)
        hidden, head, labels = make_inputs(shape, self.vocab, self.dim, self.dtype, labelled=1.0, logit_std=2.0)
        labels[:, : -self.response] = ck.IGNORE_INDEX
        hidden.requires_grad_(mode != "no_grad")
        head.weight.requires_grad_(mode == "trainable")
        return Inputs(hidden, head, labels, torch.full((2, self.pairs), REFERENCE_LOGP * self.response))

    def record(self) -> dict:
        """The workload as stored in result files."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch."), "labeled": self.labeled}


WORKLOADS = [Workload.of(model, pairs, response) for model in MODELS for pairs in PAIRS for response in RESPONSES]

SMOLVLM = Workload("smolvlm", pairs=2, tokens=1024, response=128, vocab=49280, dim=576)  # SmolVLM-256M's head
QWEN = Workload("qwen2.5-0.5b", pairs=1, tokens=1024, response=256, vocab=151936, dim=896, all_tokens=False)
ON_A_CPU: dict[Workload, tuple[str, ...]] = {  # workload -> modes
    SMOLVLM: MODES,
    replace(SMOLVLM, name="smolvlm-bf16", dtype=torch.bfloat16, all_tokens=False): MODES,
    QWEN: ("frozen",),
}


def by_mode(
    workloads: dict[Workload, tuple[str, ...]], measure: Callable[[Workload, str, int, Callable], dict]
) -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES) of every workload in each of its modes."""
    return {
        f"{workload.name}/{mode}": functools.partial(measure, workload, mode)
        for workload, modes in workloads.items()
        for mode in modes
    }
