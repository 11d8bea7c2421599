"""Named workloads of a DPO step, and the ways to compute it that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import make_inputs

BETA, COOLING = 0.1, ck.Cooling(logp_floor=-12.0, temperature=1.0)


@dataclass(frozen=True)
class Workload:
    """P pairs of T tokens, the last `response` of which are labelled."""

    name: str
    pairs: int
    tokens: int
    response: int
    vocab: int
    dim: int
    trainable: bool

    def make(self) -> tuple[Tensor, ck.Head, Tensor, Tensor]:
        """hidden [2P, T, D], head, labels [2P, T], reference log-probs [2, P]."""
        shape = (2 * self.pairs, self.tokens)
        hidden, head, labels = make_inputs(shape, self.vocab, self.dim, labelled=1.0, logit_std=2.0)
        labels[:, : -self.response] = -100
        head.weight.requires_grad_(self.trainable)
        return hidden, head, labels, torch.full((2, self.pairs), -12.0 * self.response)

    def record(self) -> dict:
        return asdict(self)


# The vocabulary and width of SmolVLM-256M.
WORKLOADS = [
    Workload("smolvlm-trainable", pairs=2, tokens=1024, response=128, vocab=49152, dim=576, trainable=True),
    Workload("smolvlm-frozen", pairs=2, tokens=1024, response=128, vocab=49152, dim=576, trainable=False),
]


def ours(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    return ck.linear_cwdpo_loss(hidden, head, labels, *refs, beta=BETA, cooling=COOLING).loss


def eager(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    """Full logits of every position, as an unfused trainer computes them."""
    logp = reference.linear_logprob(hidden, head, labels)
    return _loss_of(logp, labels, refs)


def eager_response_only(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    """Full logits of the labelled positions only: affordable in float64, where it is the truth."""
    first = int((labels[0] != -100).nonzero()[0])
    labels = labels[:, first:]
    return _loss_of(reference.linear_logprob(hidden[:, first:], head, labels), labels, refs)


def _loss_of(logp: Tensor, labels: Tensor, refs: Tensor) -> Tensor:
    pairs = refs.shape[1]
    sequences = reference.sequence_logprob(logp, labels)
    chosen, rejected = (
        ck.SequenceLogprob(*(x[part] for x in sequences)) for part in (slice(pairs), slice(pairs, None))
    )
    return reference.cwdpo_loss(chosen, rejected, *refs.to(logp.dtype), BETA, COOLING)


IMPLEMENTATIONS: dict[str, Callable] = {"cwdpo_kernels": ours, "eager": eager}
