"""The public functions: a preference loss from sequence log-probs or from hidden states, averaged over the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation as check
from .._inputs import labels_in_rows, token_logprob
from .._pairs import split_pairs
from ..functional import sequence_logprob
from ..losses import cwdpo_loss, linear_cwdpo_loss
from ..types import DEFAULT_BUDGET, IGNORE_INDEX, Head, MemoryBudget, PreferenceOutput, SequenceLogprob
from .base import MaybeReference, PreferenceLoss, loss_of_pairs, normalization, required
from .catalog import CoolingWeighted


def preference_loss(
    chosen: SequenceLogprob, rejected: SequenceLogprob, ref_chosen: MaybeReference = None,
    ref_rejected: MaybeReference = None, *, loss: PreferenceLoss, normalize: str | None = None,
) -> PreferenceOutput:  # fmt: skip
    """A preference loss, averaged over the kept pairs, and its metrics.

    chosen, rejected: the policy's log-probs, [P] each. Differentiable in `chosen.total` and `rejected.total`.
    ref_chosen, ref_rejected: the reference's total log-probs [P] in nats, or a SequenceLogprob; never differentiated.
        None for a loss without a reference (`loss.needs_reference`).
    loss: a `PreferenceLoss`, such as `CoolingWeighted(beta=0.1, cooling=Cooling())`. `PREFERENCE_LOSSES` has them all.
    normalize: "sequence" for log-ratios of totals, "token" for those of means; None: as the loss is defined.

    Pairs with an empty answer are left out of the mean (`kept` is False) and get no gradient.
    """
    op = "preference_loss"
    _check_loss(op, loss)
    if isinstance(loss, CoolingWeighted):
        references = required(op, loss, "ref_chosen", ref_chosen), required(op, loss, "ref_rejected", ref_rejected)
        normalize = normalization(op, loss, normalize)
        return cwdpo_loss(chosen, rejected, *references, beta=loss.beta, cooling=loss.cooling, normalize=normalize)
    return _mean_over_kept(loss_of_pairs(op, loss, chosen, rejected, ref_chosen, ref_rejected, normalize))


def linear_preference_loss(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, ref_chosen: MaybeReference = None,
    ref_rejected: MaybeReference = None, *, loss: PreferenceLoss, normalize: str | None = None,
    cu_seqlens: Tensor | None = None, rows: Tensor | None = None, budget: MemoryBudget = DEFAULT_BUDGET,
    ignore_index: int = IGNORE_INDEX,
) -> PreferenceOutput:  # fmt: skip
    """`preference_loss` from hidden states, without logits; gradients to hidden, head.weight and head.bias.

    hidden [2P, T, D] with labels [2P, T], or packed [N, D] with labels [N] and cu_seqlens [2P + 1]. Only labeled
    tokens are projected; `rows` as in `linear_logprob`. A `CoolingWeighted` loss runs as `linear_cwdpo_loss`, one
    fused op after the head.
    """
    op = "linear_preference_loss"
    _check_loss(op, loss)
    if isinstance(loss, CoolingWeighted):
        references = required(op, loss, "ref_chosen", ref_chosen), required(op, loss, "ref_rejected", ref_rejected)
        return linear_cwdpo_loss(
            hidden, head, labels, *references, beta=loss.beta, cooling=loss.cooling,
            normalize=normalization(op, loss, normalize), cu_seqlens=cu_seqlens, rows=rows, budget=budget,
            ignore_index=ignore_index,
        )  # fmt: skip
    labels = labels_in_rows(op, labels, rows, ignore_index)
    token_logp = token_logprob(op, hidden, head, labels, rows, budget, ignore_index)
    logp = sequence_logprob(token_logp, labels, cu_seqlens, ignore_index=ignore_index)
    check.check_pairs(op, "labels", logp.total.shape[0])
    chosen, rejected = split_pairs(*logp)
    return _mean_over_kept(loss_of_pairs(op, loss, chosen, rejected, ref_chosen, ref_rejected, normalize))


def _mean_over_kept(output: PreferenceOutput) -> PreferenceOutput:
    """The mean loss of the kept pairs; 0 if there are none."""
    share = output.kept.to(output.loss.dtype) / output.kept.sum().clamp_min(1)
    return output._replace(loss=torch.where(output.kept, output.loss * share, 0.0).sum())


def _check_loss(op: str, loss: PreferenceLoss) -> None:
    is_loss = isinstance(loss, PreferenceLoss)
    got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
    check.expect(is_loss, op, "loss", "type", "PreferenceLoss, such as DPO(beta=0.1)", got)
