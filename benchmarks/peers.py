"""The implementations of a DPO step that the benchmarks compare: ours and the peers'.

Each peer is called the way its own project calls it on the device at hand. `cannot_run` lists the peers that cannot run
there, with the reason. All take hidden [2P, T, D], a head without bias, aligned labels [2P, T] and the reference's
sequence log-probs [2, P]. Implementations that return token log-probs share one loss, a few small torch operations.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import cwdpo_kernels as ck
from cwdpo_kernels import reference

BETA = 0.1
COOLING = ck.Cooling(logp_floor=-12.0, temperature=1.0)
VANILLA = ck.Cooling(constant=1.0)  # plain DPO
OURS = "cwdpo-kernels"


@dataclass(frozen=True)
class Implementation:
    """One way to compute a step.

    package: the distribution it comes from.
    step: (hidden, head, labels, refs) -> scalar loss.
    logp: (hidden, head, labels) -> log-prob per token, or None if it only returns the loss.
    cooling: the cooling of the loss that `step` computes.
    all_tokens: it projects ignored tokens too.
    only_trainable: it is a variant that differs only with a trainable head.
    """

    package: str
    step: Callable[..., Tensor]
    logp: Callable[..., Tensor] | None = None
    cooling: ck.Cooling = COOLING
    all_tokens: bool = False
    only_trainable: bool = False


def implementations(device: str = "cpu") -> dict[str, Implementation]:
    """Ours, then the peers that can run on `device`."""
    found = {
        "cwdpo_kernels": _ours(None),
        "cwdpo_kernels, none kept": _ours(0, only_trainable=True),
    }
    return found | {name: peer for name, peer in _peers(device).items() if isinstance(peer, Implementation)}


def cannot_run(device: str = "cpu") -> dict[str, str]:
    """Name -> reason, for the peers that cannot run on `device`."""
    return {name: peer for name, peer in _peers(device).items() if isinstance(peer, str)}


def versions() -> dict[str, str]:
    """The versions of torch, triton, transformers and the installed peers."""
    packages = (
        "torch", "triton", "transformers", "cut-cross-entropy", "liger-kernel", "liger-cute-kernels", "trl",
        "quack-kernels", "nvidia-cutlass-dsl",
    )  # fmt: skip
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def loss_of(logp: Tensor, labels: Tensor, refs: Tensor, cooling: ck.Cooling = COOLING) -> Tensor:
    """The CW-DPO loss from token log-probs, in plain torch."""
    pairs = refs.shape[1]
    sequences = reference.sequence_logprob(logp, labels)
    chosen, rejected = (
        ck.SequenceLogprob(*(x[part] for x in sequences)) for part in (slice(pairs), slice(pairs, None))
    )
    ref_chosen, ref_rejected = refs.to(logp.dtype)
    return reference.cwdpo_loss(chosen, rejected, ref_chosen, ref_rejected, BETA, cooling)


def _ours(kept_bytes: int | None, only_trainable: bool = False) -> Implementation:
    budget = ck.MemoryBudget(kept_bytes=kept_bytes)

    def logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
        return ck.linear_logprob(hidden, head, labels, budget=budget)

    def step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
        ref_chosen, ref_rejected = refs
        return ck.linear_cwdpo_loss(
            hidden, head, labels, ref_chosen, ref_rejected, beta=BETA, cooling=COOLING, budget=budget
        ).loss

    return Implementation(OURS, step, logp, only_trainable=only_trainable)


def _of_logp(package: str, logp: Callable[..., Tensor], all_tokens: bool = False) -> Implementation:
    def step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
        return loss_of(logp(hidden, head, labels), labels, refs)

    return Implementation(package, step, logp, all_tokens=all_tokens)


@functools.cache  # so that compiled functions are compiled once
def _peers(device: str) -> dict[str, Implementation | str]:
    """Name -> peer, or the reason why it cannot run."""
    no_compiler = _no_compiler(device)
    in_torch = missing_in_torch()
    only_gpus = "its kernel is for GPUs" if device == "cpu" else None
    return {
        "eager, full logits": _of_logp("torch", eager_logp, all_tokens=True),
        "torch.compile, full logits": no_compiler or _of_logp("torch", compiled(eager_logp), all_tokens=True),
        "torch linear_cross_entropy": in_torch.get("torch linear_cross_entropy") or _of_logp("torch", _torch_logp),
        "torch linear_cross_entropy, chunked": in_torch.get("torch linear_cross_entropy, chunked")
        or _of_logp("torch", _torch_chunked_logp),
        "cut-cross-entropy": _not_installed("cut_cross_entropy")
        or no_compiler
        or _of_logp("cut-cross-entropy", _cut_cross_entropy_logp),
        "Liger fused linear DPO": _not_installed("liger_kernel")
        or no_compiler
        or Implementation("liger-kernel", _liger_dpo_step, cooling=VANILLA, all_tokens=True),
        "Liger scaled cross-entropy": _not_installed("liger_kernel")
        or only_gpus
        or _of_logp("liger-kernel", _liger_scaled_logp),
        "Liger linear cross-entropy, CuTe": _not_installed("liger_kernel")
        or only_gpus
        or Implementation("liger-kernel", _liger_cute_step, cooling=VANILLA, all_tokens=True),
        "QuACK linear cross-entropy": _not_installed("quack")
        or only_gpus
        or Implementation("quack-kernels", _quack_step, cooling=VANILLA, all_tokens=True),
        "TRL chunked log-prob": _not_installed("trl") or _of_logp("trl", _trl_logp, all_tokens=device == "cpu"),
    }


def missing_in_torch() -> dict[str, str]:
    """Name -> reason, for the peers that this version of torch does not have."""
    if hasattr(F, "linear_cross_entropy"):
        return {}
    reason = f"torch {torch.__version__} has no such function"
    return dict.fromkeys(("torch linear_cross_entropy", "torch linear_cross_entropy, chunked"), reason)


def _not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else "not installed"


def _no_compiler(device: str) -> str | None:
    """The reason why torch.compile cannot run on `device`, or None."""
    found = device != "cpu" or shutil.which("g++") or shutil.which("clang++")
    return None if found else "torch.compile needs a C++ compiler"


def compiled(function: Callable) -> Callable:
    """torch.compile, with an error instead of a silent fallback to eager mode after many recompilations."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function)


def eager_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    """Without a fused head: all logits, converted to float32 for the softmax."""
    return reference.logits_logprob(F.linear(hidden, head.weight).float(), labels)


def _cut_cross_entropy_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    """Its kernels on a GPU, its torch.compile implementation elsewhere. It skips ignored tokens itself."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, head.weight, labels, impl=impl, reduction="none").float()


def _torch_logp(
    hidden: Tensor, head: ck.Head, labels: Tensor, options: torch.nn.LinearCrossEntropyOptions | None = None
) -> Tensor:
    """It would project ignored tokens, so they are removed first."""
    labeled = labels != ck.IGNORE_INDEX
    nll = F.linear_cross_entropy(hidden[labeled], head.weight, labels[labeled], reduction="none", options=options)
    return hidden.new_zeros(labels.shape, dtype=torch.float32).masked_scatter(labeled, -nll.float())


def _torch_chunked_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    """On a CPU with chunks of 128 tokens, because its default takes several times as long."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if hidden.is_cuda else 128)
    return _torch_logp(hidden, head, labels, options)


def _liger_dpo_step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    """Compiled, one pair at a time, which is its default.

    It does not accept precomputed reference log-probs. Without a reference model they are 0. The loss is the same,
    because the two references of a pair are equal in all workloads.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, _ = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)(head.weight, hidden, labels)
    return loss


def _liger_scaled_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    flat = hidden.reshape(-1, hidden.shape[-1])
    return -LigerFusedLinearScaledCrossEntropyFunction.apply(flat, head.weight, labels.reshape(-1)).view(labels.shape)


def _liger_cute_step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    """The summed cross-entropy, for timing: its kernels for Hopper do not return token log-probs.

    Liger's module with LIGER_KERNEL_IMPL=cutedsl passes more arguments than its function takes, so this calls the
    function.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    flat = hidden.reshape(-1, hidden.shape[-1])
    return liger_fused_linear_cross_entropy_sm90(flat, head.weight, labels.reshape(-1), reduction="sum")


def _quack_step(hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    """The summed cross-entropy, because it does not return token log-probs. For timing: this is not the DPO loss.

    With its default of 4096 tokens per chunk and D 4096 it cannot tell the rows of a tile from its columns and raises.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    chunk_size = 8192 if hidden.shape[-1] == 4096 else 4096
    return chunked_linear_cross_entropy(hidden, head.weight, labels, chunk_size=chunk_size, reduction="sum")


def _trl_logp(hidden: Tensor, head: ck.Head, labels: Tensor) -> Tensor:
    """As its `DPOTrainer` calls it: with labeled tokens on a GPU and all tokens elsewhere.

    With gradients enabled it also computes the statistics that the trainer logs for the policy.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_logprob import _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask, compact = labels != ck.IGNORE_INDEX, _use_triton(hidden.device)
    logged = ("entropy", "mean_logits", "is_top1") if torch.is_grad_enabled() else ()
    logp = ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1]), head.weight, None,
        labels[mask] if compact else labels.clamp(min=0).reshape(-1),
        1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", *logged),
    )[0]  # fmt: skip
    if compact:
        return logp.new_zeros(mask.shape).masked_scatter(mask, logp)
    return logp.view(mask.shape).masked_fill(~mask, 0)
