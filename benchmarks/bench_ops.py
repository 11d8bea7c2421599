"""pytest-benchmark: each op alone, at the size of a step of SmolVLM (`pytest benchmarks --benchmark-only`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import cwdpo_kernels as ck
from benchmarks import logits, peers
from benchmarks.workloads import ON_A_CPU, Inputs

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Sequences = tuple[Tensor, ck.SequenceLogprob, ck.SequenceLogprob]

WORKLOAD = next(iter(ON_A_CPU))
ROUNDS = {"rounds": 5, "warmup_rounds": 1}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return WORKLOAD.make("no_grad")


@pytest.fixture(scope="module")
def sequences(inputs: Inputs) -> Sequences:
    """Log-probs per token, of the chosen answers and of the rejected answers."""
    logp = ck.linear_logprob(*inputs[:3])
    answers = ck.sequence_logprob(logp, inputs.labels)
    chosen, rejected = (ck.SequenceLogprob(*(x[part] for x in answers)) for part in (slice(2), slice(2, None)))
    return logp, chosen, rejected


@pytest.mark.parametrize("op", [ck.linear_logprob, ck.token_stats], ids=lambda op: op.__name__)
def test_linear(benchmark: BenchmarkFixture, inputs: Inputs, op: Callable) -> None:
    benchmark.pedantic(op, inputs[:3], **ROUNDS)


def test_token_divergence(benchmark: BenchmarkFixture, inputs: Inputs) -> None:
    hidden = inputs.hidden[:, -WORKLOAD.response :]
    benchmark.pedantic(ck.token_divergence, (hidden, inputs.head, hidden.flip(0), inputs.head), **ROUNDS)


@pytest.mark.parametrize("mode", logits.MODES)
@pytest.mark.parametrize("workload", logits.WORKLOADS, ids=lambda workload: workload.name)
def test_logits_logprob(benchmark: BenchmarkFixture, workload: logits.LogitsWorkload, mode: str) -> None:
    arguments = workload.make(mode)
    benchmark.pedantic(logits.run_step, (ck.logits_logprob, *arguments), **ROUNDS)


def test_sequence_logprob(benchmark: BenchmarkFixture, inputs: Inputs, sequences: Sequences) -> None:
    benchmark(ck.sequence_logprob, sequences[0], inputs.labels)


def test_cwdpo_loss(benchmark: BenchmarkFixture, inputs: Inputs, sequences: Sequences) -> None:
    benchmark(ck.cwdpo_loss, *sequences[1:], *inputs.refs, beta=peers.BETA, cooling=peers.COOLING)


def test_constrained_sft_loss(benchmark: BenchmarkFixture, sequences: Sequences) -> None:
    benchmark(ck.constrained_sft_loss, *sequences[1:], negatives=ck.GentleNegatives())


def test_cooling_weight(benchmark: BenchmarkFixture) -> None:
    benchmark(ck.cooling_weight, torch.linspace(-20, 0, 64), peers.COOLING)
