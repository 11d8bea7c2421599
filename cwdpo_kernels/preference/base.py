"""What a preference loss is: options, and a formula from the log-ratios of P pairs to P losses.

Conventions as in `losses`. The formulas are in catalog.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import validation as check
from .._pairs import NORMALIZE, reference_total, split_pairs, stack_pairs
from ..types import PreferenceOutput, SequenceLogprob

MaybeReference = Tensor | SequenceLogprob | None


class Pairs(NamedTuple):
    """What a formula sees of P pairs, [P] each, in nats, differentiable in the policy's log-probs.

    `chosen`, `rejected`: D_w and D_l, the log-ratios policy - reference of the answers, or the policy's log-probs for
        a loss without a reference. Sums over an answer's tokens, or means (`PreferenceLoss.normalize`).
    `chosen_mean`, `rejected_mean`: the policy's mean log-probs, in nats per token.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss with its options. Calling it gives the loss of each pair, [P].

    Subclasses are frozen dataclasses. They set the class variables, check their options in `__post_init__` and
    implement `per_pair`.

    beta: scale of the log-ratios, > 0. The rewards beta * D are logged for every loss.
    """

    name: ClassVar[str]  # its key in `PREFERENCE_LOSSES`
    needs_reference: ClassVar[bool] = True
    normalize: ClassVar[str] = "sequence"  # D by default: "sequence" of totals, "token" of means

    beta: float = 0.1

    def __post_init__(self) -> None:
        check.check_positive(type(self).__name__, "beta", self.beta)

    def per_pair(self, pairs: Pairs) -> Tensor:
        """The loss [P] of each pair. It may be infinite or NaN where a log-prob is."""
        raise NotImplementedError

    def rejected_weight(self, pairs: Pairs) -> Tensor:
        """The factor [P] of the rejected answers' log-ratios, for the metrics."""
        return torch.ones_like(pairs.rejected)

    def keeps(self, pairs: Pairs) -> Tensor:
        """Which pairs [P] (bool) stay in the loss. Pairs with an empty answer are left out anyway."""
        return torch.ones_like(pairs.rejected, dtype=torch.bool)

    def __call__(
        self, chosen: SequenceLogprob, rejected: SequenceLogprob, ref_chosen: MaybeReference = None,
        ref_rejected: MaybeReference = None, *, normalize: str | None = None,
    ) -> PreferenceOutput:  # fmt: skip
        """The result of `preference_loss` before the mean: its `loss` is [P], and 0 for pairs that are left out."""
        return loss_of_pairs(type(self).__name__, self, chosen, rejected, ref_chosen, ref_rejected, normalize)


def loss_of_pairs(
    op: str, loss: PreferenceLoss, chosen: SequenceLogprob, rejected: SequenceLogprob, ref_chosen: MaybeReference,
    ref_rejected: MaybeReference, normalize: str | None,
) -> PreferenceOutput:  # fmt: skip
    """`loss` of every pair. `op` is the name used in error messages."""
    total, count = stack_pairs(op, chosen, rejected)
    references = references_of(op, loss, ref_chosen, ref_rejected, chosen.total.shape[0], total)
    length = count.clamp_min(1)
    mean = total / length
    log_ratio = total if references is None else total - references
    if normalization(op, loss, normalize) == "token":
        log_ratio = log_ratio / length

    given = Pairs(*log_ratio.chunk(2), *mean.chunk(2))
    kept = (chosen.count > 0) & (rejected.count > 0) & loss.keeps(given)
    # In place of pairs that are left out, the formula sees -1: they get no gradient, not even NaN.
    seen = Pairs(*(torch.where(kept, value, -1.0) for value in given))
    losses = torch.where(kept, loss.per_pair(seen), 0.0)

    chosen_reward, rejected_reward = (loss.beta * log_ratio.detach()).chunk(2)
    margin = chosen_reward - rejected_reward
    accuracy = (margin > 0).to(margin.dtype)
    weight = loss.rejected_weight(given).detach()
    of_policy = split_pairs(total.detach(), mean.detach(), count)
    return PreferenceOutput(losses, chosen_reward, rejected_reward, margin, accuracy, weight, *of_policy, kept)


def references_of(
    op: str, loss: PreferenceLoss, ref_chosen: MaybeReference, ref_rejected: MaybeReference, pairs: int, like: Tensor
) -> Tensor | None:
    """The reference's total log-probs [2P], or None for a loss that has none."""
    references = (("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected))
    if loss.needs_reference:
        totals = [reference_total(op, arg, required(op, loss, arg, ref), pairs, like) for arg, ref in references]
        return torch.cat(totals).to(like.dtype)
    for arg, ref in references:
        expected = f"None ({type(loss).__name__} has no reference)"
        check.expect(ref is None, op, arg, "value", expected, type(ref).__name__)
    return None


def required(op: str, loss: PreferenceLoss, arg: str, ref: MaybeReference) -> Tensor | SequenceLogprob:
    """The reference's log-probs that `loss` needs."""
    if ref is None:
        check.fail(op, arg, "type", f"Tensor or SequenceLogprob ({type(loss).__name__} needs a reference)", "NoneType")
    return ref


def normalization(op: str, loss: PreferenceLoss, normalize: str | None) -> str:
    """`normalize`, or what `loss` takes by default."""
    if normalize is None:
        return loss.normalize
    check.check_choice(op, "normalize", normalize, NORMALIZE)
    return normalize
