"""`pytest benchmarks --benchmark-only`: each op of the package alone, at the size of a step of SmolVLM."""

import pytest
import torch

import cwdpo_kernels as ck
from benchmarks import logits, peers
from benchmarks.workloads import ON_A_CPU

WORKLOAD = next(iter(ON_A_CPU))
ROUNDS = {"rounds": 5, "warmup_rounds": 1}


@pytest.fixture(scope="module")
def inputs():
    return WORKLOAD.make("no_grad")


@pytest.fixture(scope="module")
def sequences(inputs):
    """Log-probs per token, and those of the chosen and the rejected answers."""
    logp = ck.linear_logprob(*inputs[:3])
    both = ck.sequence_logprob(logp, inputs.labels)
    return logp, *(ck.SequenceLogprob(*(x[part] for x in both)) for part in (slice(2), slice(2, None)))


@pytest.mark.parametrize("op", [ck.linear_logprob, ck.token_stats], ids=lambda op: op.__name__)
def test_linear(benchmark, inputs, op):
    benchmark.pedantic(op, inputs[:3], **ROUNDS)


def test_token_divergence(benchmark, inputs):
    hidden = inputs.hidden[:, -WORKLOAD.response :]
    benchmark.pedantic(ck.token_divergence, (hidden, inputs.head, hidden.flip(0), inputs.head), **ROUNDS)


@pytest.mark.parametrize("mode", logits.MODES)
@pytest.mark.parametrize("workload", logits.WORKLOADS, ids=lambda workload: workload.name)
def test_logits_logprob(benchmark, workload, mode):
    arguments = workload.make(mode)
    benchmark.pedantic(logits.run_step, (ck.logits_logprob, *arguments), **ROUNDS)


def test_sequence_logprob(benchmark, inputs, sequences):
    benchmark(ck.sequence_logprob, sequences[0], inputs.labels)


def test_cwdpo_loss(benchmark, inputs, sequences):
    benchmark(ck.cwdpo_loss, *sequences[1:], *inputs.refs, beta=peers.BETA, cooling=peers.COOLING)


def test_constrained_sft_loss(benchmark, sequences):
    benchmark(ck.constrained_sft_loss, *sequences[1:], negatives=ck.GentleNegatives())


def test_cooling_weight(benchmark):
    benchmark(ck.cooling_weight, torch.linspace(-20, 0, 64), peers.COOLING)
