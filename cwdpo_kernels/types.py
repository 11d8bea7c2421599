"""Options and results of the public functions: frozen dataclasses and named tuples.

Shapes: N tokens, S sequences, P pairs, D hidden, V vocabulary. Log-probabilities are in nats.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .validation import SFT_MODES, SMALLEST, check_choice, check_number, expect, fail

IGNORE_INDEX = -100


@dataclass(frozen=True)
class VocabShard:
    """The part [start, start + V_r) of a vocabulary of `size` entries that this process has of a head.

    All processes of `group` (a ProcessGroup, None for the default one) hold one part each, which may be empty, and call
    with the same hidden states and labels. If labels differ, log-probs are NaN on a GPU and in compiled graphs, and a
    CPU raises a ValueError; it also checks that the parts cover the vocabulary without overlap. Labels count from the
    start of the whole vocabulary. The gradient of hidden is summed over the processes, unless `reduce_grad_hidden` is
    False because the caller does that.
    """

    group: Any
    start: int
    size: int
    reduce_grad_hidden: bool = True

    def __post_init__(self) -> None:
        for name in ("start", "size"):
            value, least = getattr(self, name), int(name == "size")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                fail("VocabShard", name, "value", f"an integer >= {least}", repr(value))


@dataclass(frozen=True)
class Head:
    """The output head: logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = cap * tanh(z / cap).

    weight [V, D]; bias [V] or None; `scale` multiplies the logits (use it for 1 / temperature); `softcap` is the cap
    of Gemma-like models, in logits, or None. The tensors are not copied, so gradients flow into them.

    shard: the head is split over processes by vocabulary (tensor parallelism), and weight and bias are this process's
        part. Then `linear_logprob`, `token_stats` and the losses give the results of the whole head in every process.
        A DTensor weight with placement Shard(0) needs no `shard`: it says which part it is.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabShard | None = None

    @property
    def vocab(self) -> int:
        """V, of all processes together."""
        return self.weight.shape[0] if self.shard is None else self.shard.size

    @classmethod
    def of(cls, module: torch.nn.Module, scale: float = 1.0, softcap: float | None = None) -> Head:
        """The head of a linear module: its `weight` [V, D] and its `bias` [V], if it has one."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            fail("Head.of", "module", "attribute weight of type", "Tensor", type(weight).__name__)
        return cls(weight, getattr(module, "bias", None), scale, softcap)


@dataclass(frozen=True)
class Cooling:
    """The cooling weight of a rejected answer: w_c = sigmoid((mean_logp - logp_floor) / temperature), no gradient.

    `logp_floor` and `temperature` (tau > 0) are in nats per token. `constant` replaces w_c with a fixed weight in
    [0, 1]; 1.0 is vanilla DPO. Pairs whose rejected mean log-prob is below `drop_below` are left out of the loss.
    Source: CW-DPO, arXiv 2510.11978.
    """

    logp_floor: float = -3.0
    temperature: float = 1.0
    constant: float | None = None
    drop_below: float | None = None

    def __post_init__(self) -> None:
        op = "Cooling"
        check_number(op, "logp_floor", self.logp_floor, "finite")
        check_number(op, "temperature", self.temperature, "finite and > 0", low=SMALLEST)
        check_number(op, "constant", self.constant, "None or in [0, 1]", low=0, high=1, optional=True)
        drops_all_or_none = isinstance(self.drop_below, float) and math.isinf(self.drop_below)
        if not drops_all_or_none:
            limit = sys.float_info.max
            check_number(op, "drop_below", self.drop_below, "None or a number", -limit, limit, optional=True)


@dataclass(frozen=True)
class GentleNegatives:
    """How the stage-1 loss treats the rejected answers.

    mode "hinge":     adds weight * relu(nll_floor - mean_batch NLL(rejected)). It keeps rejected answers unlikely, and
                      is zero once their mean NLL reaches `nll_floor` (lambda and C of the paper).
    mode "hard":      the constraint mean_batch NLL(rejected) >= nll_floor comes first: where a batch violates it, the
                      loss is nll_floor - mean_batch NLL(rejected) alone, else it is NLL(chosen) alone. `weight` has no
                      effect. It is the paper's ablation "w/o soft penalty", as a switching subgradient method (Polyak
                      1967; CRPO, arXiv 2011.05869).
    mode "smoothed":  adds weight * label-smoothed cross-entropy of the rejected answers, with mass `smoothing` spread
                      uniformly: the low-weight smoothed supervision of the paper's abstract.
    normalize "token": an answer's NLL, and so `nll_floor`, is in nats per token; "sequence": in nats per answer, the
                      sum over its tokens, which is the unit that the paper prints for C.
    """

    MODES: ClassVar[tuple[str, ...]] = SFT_MODES

    weight: float = 0.1
    nll_floor: float = 3.0
    mode: str = "hinge"
    smoothing: float = 0.1
    normalize: str = "token"

    def __post_init__(self) -> None:
        op = "GentleNegatives"
        check_number(op, "weight", self.weight, "finite and >= 0", low=0)
        check_number(op, "nll_floor", self.nll_floor, "finite")
        check_choice(op, "mode", self.mode, self.MODES)
        check_number(op, "smoothing", self.smoothing, "in [0, 1)", low=0)
        expect(self.smoothing < 1, op, "smoothing", "value", "in [0, 1)", self.smoothing)
        ok = self.normalize in ("token", "sequence")
        expect(ok, op, "normalize", "value", "'token' or 'sequence'", self.normalize)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that a linear op may use beyond its inputs, outputs and gradients. Affects speed, not the result.

    workspace_bytes: limit for the vocabulary tiles in memory at one time (always at least one). None: the default of
        the device's backend, `default_workspace_bytes(device)`.

    kept_bytes: limit for the tiles that forward of a trainable head keeps for backward; 0 recomputes all of them. None:
        as many as fit in the memory of the head's gradient, which forward then allocates and backward overwrites.
        They cost no memory beyond the gradient. Nearly all tiles fit if there are no more labeled tokens than hidden
        dimensions (half as many in half precision on a CPU, except in bfloat16 with AVX512-BF16). None keeps
        nothing in a compiled graph, in float64, and if the weight is frozen or not contiguous. On a GPU, nothing is
        kept with a soft cap or by `token_stats`, whatever the limit.
    """

    workspace_bytes: int | None = None
    kept_bytes: int | None = None

    def __post_init__(self) -> None:
        op = "MemoryBudget"
        for name, least in (("workspace_bytes", 1), ("kept_bytes", 0)):
            value = getattr(self, name)
            ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63)
            expect(ok, op, name, "value", f"None or an integer in [{least}, 2^63)", repr(value))


DEFAULT_BUDGET = MemoryBudget()


class SequenceLogprob(NamedTuple):
    """Per sequence [S]: `total` (nats), `mean` (nats per token; 0 if empty), `count` (labeled tokens, int64)."""

    total: Tensor
    mean: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count on purpose


class TokenStats(NamedTuple):
    """Per token, in nats, 0 (False) where ignored. `logp`, `entropy` and `logsumexp` have gradients.

    `logp` of the label; `entropy` of the distribution; `top1_prob`, the largest probability; `is_top1`, whether it is
    the label's (bool); `logsumexp` of the logits; `log_sum_sq_probs` = log sum_v p_v^2; `mean_logit` over the
    vocabulary.
    """

    logp: Tensor
    entropy: Tensor
    top1_prob: Tensor
    is_top1: Tensor
    logsumexp: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor


class Divergence(NamedTuple):
    """Per token, between distributions p and q: `tv` in [0, 1], `js` in [0, ln 2], `kl` = KL(p || q) (nats)."""

    tv: Tensor
    js: Tensor
    kl: Tensor


class PreferenceOutput(NamedTuple):
    """`loss` (scalar, differentiable) and metrics per pair [P], detached.

    `chosen_reward` = beta * D_w, `rejected_reward` = beta * D_l, `margin` = their difference (without the cooling
    weight), `accuracy` = 1.0 where margin > 0, `cooling_weight` = w_c (1 for a loss without one), `chosen_logp` and
    `rejected_logp` of the policy, `kept` = False where the pair is left out of the mean (an empty answer, or below
    `Cooling.drop_below`). D = policy - reference log-prob, or the policy's log-prob for a loss without a reference.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    margin: Tensor
    accuracy: Tensor
    cooling_weight: Tensor
    chosen_logp: SequenceLogprob
    rejected_logp: SequenceLogprob
    kept: Tensor


CWDPOOutput = PreferenceOutput  # the name that the functions of CW-DPO use


class ConstrainedSFTOutput(NamedTuple):
    """`loss` (scalar, differentiable) and, detached, its terms and the policy's log-probs.

    `chosen_nll`, `rejected_nll`: batch means in nats per token (or per sequence); `penalty`: the term of the rejected
    answers, with its weight. Of mode "hard", a positive `penalty` is the whole loss.
    """

    loss: Tensor
    chosen_nll: Tensor
    rejected_nll: Tensor
    penalty: Tensor
    chosen_logp: SequenceLogprob
    rejected_logp: SequenceLogprob
