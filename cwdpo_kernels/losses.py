"""The public losses: constrained supervised fine-tuning and Cooling-Weighted DPO.

From hidden states, logits or log-probs. Conventions as in `functional`. A batch of 2P sequences holds the P chosen
ones first and then the P rejected ones, in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation as check
from ._inputs import labels_in_rows, sequence_offsets, token_logprob, whole_head
from ._ops import ops
from ._pairs import NORMALIZE, reference_total, split_pairs, stack_pairs
from ._smoothing import lead_over_mean_logit
from .functional import logits_logprob, sequence_logprob
from .ops import apply
from .types import (
    DEFAULT_BUDGET,
    IGNORE_INDEX,
    ConstrainedSFTOutput,
    Cooling,
    CWDPOOutput,
    GentleNegatives,
    Head,
    MemoryBudget,
    SequenceLogprob,
)


def cooling_weight(mean_logp: Tensor, cooling: Cooling) -> Tensor:
    """w_c = sigmoid((mean_logp - logp_floor) / temperature) in [0, 1], or the constant. Any shape; no gradient.

    mean_logp: the policy's mean log-prob of each rejected answer, in nats per token.
    """
    op = "cooling_weight"
    check.check_dtype(op, "mean_logp", mean_logp, check.FLOAT_DTYPES)
    _check_cooling(op, cooling)
    return ops.cooling_weight(
        mean_logp=mean_logp.detach(), logp_floor=cooling.logp_floor, temperature=cooling.temperature,
        constant=cooling.constant,
    )  # fmt: skip


def cwdpo_loss(
    chosen: SequenceLogprob, rejected: SequenceLogprob, ref_chosen: Tensor | SequenceLogprob,
    ref_rejected: Tensor | SequenceLogprob, *, beta: float, cooling: Cooling, normalize: str = "sequence",
) -> CWDPOOutput:  # fmt: skip
    """-log sigmoid(beta * (D_w - w_c * D_l)), averaged over the kept pairs; D = policy - reference log-prob.

    chosen, rejected: the policy's log-probs, [P] each. Differentiable in `chosen.total` and `rejected.total`; w_c is
        a constant.
    ref_chosen, ref_rejected: the reference's total log-probs [P] in nats, or a SequenceLogprob; never differentiated.
    normalize: "sequence" for D of totals, "token" for D of means.

    Pairs with an empty answer, or below `cooling.drop_below`, are left out of the mean (`kept` is False).
    """
    op = "cwdpo_loss"
    sum_logp, count = stack_pairs(op, chosen, rejected)
    offsets = torch.arange(sum_logp.shape[0] + 1, device=sum_logp.device)
    return _cwdpo(op, sum_logp, None, count, offsets, ref_chosen, ref_rejected, beta, cooling, normalize, IGNORE_INDEX)


def linear_cwdpo_loss(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, ref_chosen: Tensor | SequenceLogprob,
    ref_rejected: Tensor | SequenceLogprob, *, beta: float, cooling: Cooling, normalize: str = "sequence",
    cu_seqlens: Tensor | None = None, rows: Tensor | None = None, budget: MemoryBudget = DEFAULT_BUDGET,
    ignore_index: int = IGNORE_INDEX,
) -> CWDPOOutput:  # fmt: skip
    """`cwdpo_loss` from hidden states, without logits; gradients to hidden, head.weight and head.bias.

    hidden [2P, T, D] with labels [2P, T], or packed [N, D] with labels [N] and cu_seqlens [2P + 1]. Only labeled
    tokens are projected; `rows` as in `linear_logprob`.
    """
    op = "linear_cwdpo_loss"
    _check_cooling(op, cooling)
    labels = labels_in_rows(op, labels, rows, ignore_index)
    token_logp = token_logprob(op, hidden, head, labels, rows, budget, ignore_index)
    return _token_cwdpo(
        op, token_logp, labels, cu_seqlens, ref_chosen, ref_rejected, beta, cooling, normalize, ignore_index
    )


def logits_cwdpo_loss(
    logits: Tensor, labels: Tensor, ref_chosen: Tensor | SequenceLogprob, ref_rejected: Tensor | SequenceLogprob, *,
    beta: float, cooling: Cooling, normalize: str = "sequence", cu_seqlens: Tensor | None = None,
    reuse_logits: bool = False, ignore_index: int = IGNORE_INDEX,
) -> CWDPOOutput:  # fmt: skip
    """`linear_cwdpo_loss` for trainers that already hold logits [2P, T, V] or packed [N, V]."""
    op = "logits_cwdpo_loss"
    token_logp = logits_logprob(logits, labels, reuse_logits=reuse_logits, ignore_index=ignore_index)
    return _token_cwdpo(
        op, token_logp, labels, cu_seqlens, ref_chosen, ref_rejected, beta, cooling, normalize, ignore_index
    )


def constrained_sft_loss(
    chosen: SequenceLogprob, rejected: SequenceLogprob, *, negatives: GentleNegatives,
    rejected_smoothing: Tensor | None = None,
) -> ConstrainedSFTOutput:  # fmt: skip
    """Stage 1: NLL(chosen) + weight * relu(nll_floor - mean_batch NLL(rejected)), or another `GentleNegatives.mode`.

    chosen, rejected: the policy's log-probs, [P] each. Differentiable in their totals and in `rejected_smoothing`.
    rejected_smoothing [P]: required if negatives.mode is "smoothed": the sum of z_y - mean_v z_v over each rejected
        answer's tokens (`linear_constrained_sft_loss` computes it from the mean row of the head).
    """
    op = "constrained_sft_loss"
    sum_logp, count = stack_pairs(op, chosen, rejected)
    offsets = torch.arange(sum_logp.shape[0] + 1, device=sum_logp.device)
    return _constrained_sft(op, sum_logp, None, count, offsets, negatives, rejected_smoothing, IGNORE_INDEX)


def linear_constrained_sft_loss(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, *, negatives: GentleNegatives,
    cu_seqlens: Tensor | None = None, rows: Tensor | None = None, budget: MemoryBudget = DEFAULT_BUDGET,
    ignore_index: int = IGNORE_INDEX,
) -> ConstrainedSFTOutput:  # fmt: skip
    """`constrained_sft_loss` from hidden states; shapes as in `linear_cwdpo_loss`.

    Label smoothing (mode "smoothed") needs no vocabulary pass: mean_v z_v = scale * (h . mean(W) + mean(b)).
    Errors: NotImplementedError for "smoothed" with a soft cap, where that identity does not hold.
    """
    op = "linear_constrained_sft_loss"
    labels = labels_in_rows(op, labels, rows, ignore_index)
    token_logp = token_logprob(op, hidden, head, labels, rows, budget, ignore_index)
    offsets = sequence_offsets(op, labels, cu_seqlens)
    smoothing = None
    _check_negatives(op, negatives)
    if negatives.mode == "smoothed":
        head = whole_head(op, "head", head)
        if head.softcap is not None:
            raise NotImplementedError(f"{op}: negatives.mode='smoothed' is not defined with a soft cap")
        lead = lead_over_mean_logit(hidden, head, labels, ignore_index)
        summed = sequence_logprob(lead, labels, cu_seqlens, ignore_index=ignore_index).total
        smoothing = summed[check.check_pairs(op, "labels", summed.shape[0]) :]
    flat = token_logp.reshape(-1)
    return _constrained_sft(op, flat, labels.reshape(-1), None, offsets, negatives, smoothing, ignore_index)


def _token_cwdpo(
    op: str, token_logp: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ref_chosen: Tensor | SequenceLogprob,
    ref_rejected: Tensor | SequenceLogprob, beta: float, cooling: Cooling, normalize: str, ignore_index: int,
) -> CWDPOOutput:  # fmt: skip
    offsets = sequence_offsets(op, labels, cu_seqlens)
    flat, flat_labels = token_logp.reshape(-1), labels.reshape(-1)
    return _cwdpo(
        op, flat, flat_labels, None, offsets, ref_chosen, ref_rejected, beta, cooling, normalize, ignore_index
    )


def _cwdpo(
    op: str, logp: Tensor, labels: Tensor | None, count: Tensor | None, offsets: Tensor,
    ref_chosen: Tensor | SequenceLogprob, ref_rejected: Tensor | SequenceLogprob, beta: float, cooling: Cooling,
    normalize: str, ignore_index: int,
) -> CWDPOOutput:  # fmt: skip
    pairs = check.check_pairs(op, "labels" if count is None else "chosen", offsets.shape[0] - 1)
    check.check_positive(op, "beta", beta)
    check.check_choice(op, "normalize", normalize, NORMALIZE)
    references = [
        reference_total(op, arg, ref, pairs, logp)
        for arg, ref in (("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected))
    ]
    _check_cooling(op, cooling)
    loss, chosen_reward, rejected_reward, margin, accuracy, weight, kept, sum_logp, mean, count, _ = apply(
        "cwdpo_loss",
        logp=logp, labels=labels, count=count, cu_seqlens=offsets, ref_chosen=references[0],
        ref_rejected=references[1], beta=float(beta), logp_floor=cooling.logp_floor, temperature=cooling.temperature,
        constant=cooling.constant, drop_below=cooling.drop_below, per_token=normalize == "token",
        ignore_index=ignore_index,
    )  # fmt: skip
    chosen, rejected = split_pairs(sum_logp, mean, count)
    return CWDPOOutput(loss, chosen_reward, rejected_reward, margin, accuracy, weight, chosen, rejected, kept)


def _constrained_sft(
    op: str, logp: Tensor, labels: Tensor | None, count: Tensor | None, offsets: Tensor, negatives: GentleNegatives,
    rejected_smoothing: Tensor | None, ignore_index: int,
) -> ConstrainedSFTOutput:  # fmt: skip
    _check_negatives(op, negatives)
    pairs = check.check_pairs(op, "labels" if count is None else "chosen", offsets.shape[0] - 1)
    per_token = negatives.normalize == "token"
    loss, chosen_nll, rejected_nll, penalty, sum_logp, mean, counts, _ = apply(
        "constrained_sft_loss",
        logp=logp, labels=labels, count=count, cu_seqlens=offsets, weight=float(negatives.weight),
        nll_floor=float(negatives.nll_floor), mode=negatives.mode, per_token=per_token, ignore_index=ignore_index,
    )  # fmt: skip
    if negatives.mode == "smoothed":
        if not isinstance(rejected_smoothing, Tensor):
            kind = type(rejected_smoothing).__name__
            check.fail(op, "rejected_smoothing", "type", "Tensor [P] (mode 'smoothed')", kind)
        check.check_per_pair(op, "rejected_smoothing", rejected_smoothing, pairs, logp)
        lengths = counts[pairs:]
        smoothing = rejected_smoothing / lengths.clamp_min(1) if per_token else rejected_smoothing
        spread = smoothing.sum() / (lengths > 0).sum().clamp_min(1)
        if factor := negatives.weight * negatives.smoothing:  # 0 * inf would be NaN
            loss, penalty = loss + factor * spread, penalty + factor * spread.detach()
    return ConstrainedSFTOutput(loss, chosen_nll, rejected_nll, penalty, *split_pairs(sum_logp, mean, counts))


def _check_negatives(op: str, negatives: GentleNegatives) -> None:
    kind = type(negatives).__name__
    check.expect(isinstance(negatives, GentleNegatives), op, "negatives", "type", "GentleNegatives", kind)


def _check_cooling(op: str, cooling: Cooling) -> None:
    check.expect(isinstance(cooling, Cooling), op, "cooling", "type", "Cooling", type(cooling).__name__)
