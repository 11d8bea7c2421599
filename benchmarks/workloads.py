"""Named workloads of a DPO step, and the ways to compute it that are compared."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
    dtype: torch.dtype = torch.float32
    eager: bool = False  # full logits too: gigabytes

    @property
    def labelled(self) -> int:
        return 2 * self.pairs * self.response

    def make(self) -> tuple[Tensor, ck.Head, Tensor, Tensor]:
        """hidden [2P, T, D], head, labels [2P, T], reference log-probs [2, P]."""
        shape = (2 * self.pairs, self.tokens)
        hidden, head, labels = make_inputs(shape, self.vocab, self.dim, self.dtype, labelled=1.0, logit_std=2.0)
        labels[:, : -self.response] = -100
        head.weight.requires_grad_(self.trainable)
        return hidden, head, labels, torch.full((2, self.pairs), -12.0 * self.response)

    def record(self) -> dict:
        return {**asdict(self), "dtype": str(self.dtype)}


SMOLVLM = {"pairs": 2, "tokens": 1024, "response": 128, "vocab": 49152, "dim": 576}  # SmolVLM-256M's head
QWEN_SMALL = {"pairs": 1, "tokens": 1024, "response": 256, "vocab": 151936, "dim": 896}  # Qwen2.5-0.5B's head
WORKLOADS = [
    Workload("smolvlm-frozen", **SMOLVLM, trainable=False, eager=True),
    Workload("smolvlm-trainable", **SMOLVLM, trainable=True, eager=True),
    Workload("qwen-frozen", **QWEN_SMALL, trainable=False),
    Workload("smolvlm-frozen-bf16", **SMOLVLM, trainable=False, dtype=torch.bfloat16),
    Workload("smolvlm-trainable-bf16", **SMOLVLM, trainable=True, dtype=torch.bfloat16),
]


@dataclass(frozen=True)
class Implementation:
    """`logp` (hidden, head, labels) -> [...] per token; `step` (hidden, head, labels, refs) -> the scalar loss.

    `package`: whose it is, for its version. `kept_bytes` is ours: what forward keeps for backward.
    """

    package: str
    logp: Callable
    step: Callable
    kept_bytes: int | None = None


def ours(kept_bytes: int | None) -> Implementation:
    budget = ck.MemoryBudget(kept_bytes=kept_bytes)

    def logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
        return ck.linear_logprob(hidden, head, labels, budget=budget)

    def step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
        options = {"beta": BETA, "cooling": COOLING, "budget": budget}
        return ck.linear_cwdpo_loss(hidden, head, labels, *refs, **options).loss

    return Implementation("cwdpo-kernels", logp, step, kept_bytes=kept_bytes)


def of_logp(package: str, logp: Callable) -> Implementation:
    """A peer gives log-probs; the loss of sequences is a few small torch operations for all of them."""

    def step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
        return loss_of(logp(hidden, head, labels), labels, refs)

    return Implementation(package, logp, step)


def loss_of(logp: Tensor, labels: Tensor, refs: Tensor) -> Tensor:
    pairs = refs.shape[1]
    sequences = reference.sequence_logprob(logp, labels)
    chosen, rejected = (
        ck.SequenceLogprob(*(x[part] for x in sequences)) for part in (slice(pairs), slice(pairs, None))
    )
    return reference.cwdpo_loss(chosen, rejected, *refs.to(logp.dtype), BETA, COOLING)


def cut_cross_entropy_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    """Its implementation for devices without its Triton kernels; it takes out the ignored tokens itself."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, head.weight, labels, impl="torch_compile", reduction="none").float()


def torch_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    """torch's chunked linear_cross_entropy, spared the tokens without a label (it would project them)."""
    live = labels != -100
    nll = torch.nn.functional.linear_cross_entropy(hidden[live], head.weight, labels[live], reduction="none")
    return hidden.new_zeros(labels.shape, dtype=torch.float32).masked_scatter(live, -nll.float())


def implementations() -> dict[str, Implementation]:
    """Those that can run here; a peer that is not installed is left out (see `missing_peers`)."""
    found = {
        "cwdpo_kernels": ours(None),
        "cwdpo_kernels, none kept": ours(0),
        "eager": of_logp("torch", reference.linear_logprob),
    }
    if "cut_cross_entropy" not in missing_peers():
        found["cut_cross_entropy"] = of_logp("cut-cross-entropy", cut_cross_entropy_logp)
    if "torch" not in missing_peers():
        found["torch"] = of_logp("torch", torch_logp)
    return found


def missing_peers() -> dict[str, str]:
    """Peers that cannot run here, and why."""
    missing = {}
    if importlib.util.find_spec("cut_cross_entropy") is None:
        missing["cut_cross_entropy"] = "not installed"
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        missing["torch"] = f"torch {torch.__version__} has no linear_cross_entropy"
    return missing


def applicable(workload: Workload) -> dict[str, Implementation]:
    """Nothing is kept for a frozen head: there the two variants of ours are one."""
    return {
        name: implementation
        for name, implementation in implementations().items()
        if (workload.eager or name != "eager") and (workload.trainable or implementation.kept_bytes is None)
    }


def versions() -> dict[str, str]:
    packages = {implementation.package for implementation in implementations().values()} - {"cwdpo-kernels"}
    return {package: importlib.metadata.version(package) for package in sorted(packages)}
