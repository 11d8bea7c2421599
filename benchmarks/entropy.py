"""Log-probs and entropies with gradients, as policy gradients with an entropy bonus need them (CPU).

    loss = -sum_t (a_t log p_t + 0.01 entropy_t)        over the labeled tokens, with fixed a_t

In the mode "reported", entropies are only reported, as most trainers do: the head is frozen, and the loss has no bonus.
Ours, TRL's head, and eager and compiled logits. Cut-cross-entropy's head has no entropy: its row is the step without
it. Liger's heads have none either, and return no log-probs to weight. Every implementation is first compared with
float64.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import cwdpo_kernels as ck
from benchmarks import linear, peers, timing
from benchmarks.workloads import QWEN, SMOLVLM, Inputs, Workload, by_mode
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, leaves, relative_error

COEFFICIENT = 0.01
REPORTED = "reported"
OURS = "cwdpo_kernels"
WITHOUT_ENTROPY = ("cut-cross-entropy, no entropy",)
ON_A_CPU: dict[Workload, tuple[str, ...]] = {
    SMOLVLM: ("frozen", "trainable", REPORTED),
    replace(SMOLVLM, name="smolvlm-bf16", dtype=torch.bfloat16, all_tokens=False): ("frozen", "trainable", REPORTED),
    QWEN: ("frozen", REPORTED),
}
# (hidden, head, labels) -> log-probs and, if there are any, entropies per token
Statistics = Callable[[Tensor, ck.Head, Tensor], tuple[Tensor, Tensor | None]]


def measurements() -> dict[str, Callable[..., dict]]:
    """Name -> measurement (see run.SUITES)."""
    return by_mode(ON_A_CPU, measure)


def measure(workload: Workload, mode: str, repeats: int, call: Callable) -> dict:
    """Errors, times and peak memory of every implementation."""
    inputs = workload.make(mode)
    found = implementations(mode)
    result: dict[str, dict] = {
        name: {"relative_error": error} for name, error in errors(workload, mode, inputs, found).items()
    }
    steps = {
        name: functools.partial(linear.step_seconds, functools.partial(loss, mode, statistics), inputs)
        for name, statistics in found.items()
    }
    with timing.others() as others:
        times = timing.interleaved(steps, repeats)
    medians = {name: timing.summary(values)["median_seconds"] for name, values in times.items()}
    rivals = {name: median for name, median in medians.items() if name not in WITHOUT_ENTROPY}
    ratios = timing.against_best_peer(rivals, {OURS})
    for name, entry in result.items():
        entry |= timing.summary(times[name]) | {"extra_mib": call(peak, workload, mode, name) / 2**20}
        if name in ratios:
            entry["against_best_peer"] = ratios[name]
    return {"workload": workload.record(), "mode": mode, "others": others(), "results": result}


def implementations(mode: str) -> dict[str, Statistics]:
    """Ours, then the peers that can run on a CPU."""
    ours, eager = functools.partial(_ours, mode), functools.partial(_eager, mode)
    found: dict[str, Statistics] = {OURS: ours, "eager, full logits": eager}
    if peers._no_compiler("cpu") is None:
        found["torch.compile, full logits"] = _compiled(mode)
    if importlib.util.find_spec("trl"):
        found["TRL fused head"] = _trl
    if importlib.util.find_spec("cut_cross_entropy") and peers._no_compiler("cpu") is None:
        found["cut-cross-entropy, no entropy"] = _cut_cross_entropy
    return found


def loss(mode: str, statistics: Statistics, hidden: Tensor, head: ck.Head, labels: Tensor, refs: Tensor) -> Tensor:
    """The step, of the labeled tokens. `refs` has no effect."""
    labeled = labels != ck.IGNORE_INDEX
    logp, entropy = statistics(hidden[labeled], head, labels[labeled])
    advantages = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype)
    bonus = 0.0 if entropy is None or mode == REPORTED else COEFFICIENT * entropy.sum()
    return -(advantages * logp).sum() - bonus


def errors(workload: Workload, mode: str, inputs: Inputs, found: dict[str, Statistics]) -> dict[str, dict]:
    """Relative errors against float64. Raises SystemExit if an error of ours exceeds its tolerance."""
    hidden64, head64 = as_float64(inputs.hidden, inputs.head)
    truth = outcome(mode, _reference, inputs._replace(hidden=hidden64, head=head64))
    result: dict[str, dict] = {}
    for name, statistics in found.items():
        if name in WITHOUT_ENTROPY:
            outcome(mode, statistics, inputs)  # a warm-up
            result[name] = {}
            continue
        result[name] = {
            what: relative_error(value, truth[what]) for what, value in outcome(mode, statistics, inputs).items()
        }
        for what, error in result[name].items():
            allowed = linear.GRADIENT_TOLERANCE[workload.dtype] if what.startswith("grad") else linear.VALUE_TOLERANCE
            if name == OURS and not error <= allowed:
                raise SystemExit(linear.wrong(f"entropy: {workload.name}/{mode}", name, what, error, allowed))
    return result


def outcome(mode: str, statistics: Statistics, inputs: Inputs) -> dict[str, Tensor]:
    """Log-probs and entropies of the labeled tokens, and the gradients of the loss."""
    labeled = inputs.labels != ck.IGNORE_INDEX
    with torch.no_grad():
        logp, entropy = statistics(inputs.hidden[labeled], inputs.head, inputs.labels[labeled])
    values = {"logp": logp} if entropy is None else {"logp": logp, "entropy": entropy}
    wanted = dict(zip(("grad_hidden", "grad_weight"), leaves(inputs.hidden, inputs.head), strict=False))
    grads = torch.autograd.grad(loss(mode, statistics, *inputs), list(wanted.values()))
    return values | dict(zip(wanted, grads, strict=True))


def peak(workload: Workload, mode: str, name: str) -> int:
    """Peak memory of a step in bytes. Runs in a worker."""
    return linear.peak_of(functools.partial(loss, mode, implementations(mode)[name]), workload, mode)


def _ours(mode: str, hidden: Tensor, head: ck.Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = ck.token_stats(hidden, head, labels, expect_entropy_grad=mode != REPORTED)
    return stats.logp, stats.entropy


def _reference(hidden: Tensor, head: ck.Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = reference.token_stats(hidden, head, labels)
    return stats.logp, stats.entropy


def _eager(mode: str, hidden: Tensor, head: ck.Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All logits, converted to float32 for the softmax."""
    log_p = torch.nn.functional.linear(hidden, head.weight).float().log_softmax(-1)
    logp = log_p.gather(-1, labels[:, None])[:, 0]
    log_p = log_p.detach() if mode == REPORTED else log_p
    return logp, -(log_p.exp() * log_p).sum(-1)


@functools.cache
def _compiled(mode: str) -> Statistics:
    return peers.compiled(functools.partial(_eager, mode))


def _trl(hidden: Tensor, head: ck.Head, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As its fused head calls it, with the labeled tokens only."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )
    return logp, entropy


def _cut_cross_entropy(hidden: Tensor, head: ck.Head, labels: Tensor) -> tuple[Tensor, None]:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, head.weight, labels, impl="torch_compile", reduction="none").float(), None
