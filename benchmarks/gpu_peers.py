"""The steps of the peers on a GPU. `benchmarks.gpu` gives each peer a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

import cwdpo_kernels as ck
from benchmarks import cost, gpu_measure, peers
from benchmarks.gpu_plan import MODES
from benchmarks.models import Shape

ANSWERS = 8  # 2P: peers take [2P, T, D]


def step_of(shape: Shape, op: str) -> tuple[Callable[[], None], cost.Cost]:
    """The step of op "PEER, MODE", and what every method needs at least."""
    name, mode = op.rsplit(", ", 1)
    return steps_of(name, shape)[mode], cost.linear_logprob(shape.tokens, shape.dim, shape.vocab, 2, mode)


def steps_of(name: str, shape: Shape) -> dict[str, Callable[[], None]]:
    """Mode -> forward and backward of a peer, with all tokens labeled. Raises RuntimeError if it cannot run here."""
    hidden, weight, labels = gpu_measure.linear_inputs(shape)
    hidden_ATD = hidden.detach().view(ANSWERS, -1, shape.dim).requires_grad_()
    labels_AT, refs = labels.view(ANSWERS, -1), torch.zeros(2, ANSWERS // 2)
    device = hidden.device.type
    if reason := peers.cannot_run(device).get(name):
        raise RuntimeError(reason)
    peer = peers.implementations(device)[name]

    def step(weight: torch.Tensor) -> None:
        head = ck.Head(weight)
        logp = peer.logp or (lambda *args: peer.step(*args, refs))
        value = logp(hidden_ATD, head, labels_AT).sum()
        torch.autograd.grad(value, [x for x in (hidden_ATD, weight) if x.requires_grad])

    return dict(zip(MODES, (lambda: step(weight.detach()), lambda: step(weight)), strict=True))
