"""Pairs of sequences: P chosen ones, then P rejected ones, and the reference's log-probs of them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation as check
from ._inputs import at_least_float32
from .types import SequenceLogprob

NORMALIZE = ("sequence", "token")


def stack_pairs(op: str, chosen: SequenceLogprob, rejected: SequenceLogprob) -> tuple[Tensor, Tensor]:
    """Check the log-probs of P pairs, and return totals and counts of 2P sequences, chosen first."""
    for arg, value in (("chosen", chosen), ("rejected", rejected)):
        check.expect(isinstance(value, SequenceLogprob), op, arg, "type", "SequenceLogprob", type(value).__name__)
        check.check_dtype(op, f"{arg}.total", value.total, check.FLOAT_DTYPES)
        check.check_dtype(op, f"{arg}.count", value.count, check.INDEX_DTYPES)
        shape = list(value.total.shape)
        check.expect(len(shape) == 1, op, f"{arg}.total", "shape", "[P]", shape)
        check.check_device(op, f"{arg}.count", value.count, chosen.total, "the policy's log-probs")
        check.expect(list(value.count.shape) == shape, op, f"{arg}.count", "shape", shape, list(value.count.shape))
    check.check_per_pair(op, "rejected.total", rejected.total, chosen.total.shape[0], chosen.total)
    sum_logp = torch.cat([chosen.total, rejected.total])
    return at_least_float32(sum_logp), torch.cat([chosen.count, rejected.count]).long()


def split_pairs(sum_logp: Tensor, mean: Tensor, count: Tensor) -> tuple[SequenceLogprob, SequenceLogprob]:
    """The log-probs of the chosen [P] and of the rejected [P] sequences."""
    pairs = sum_logp.shape[0] // 2
    chosen = SequenceLogprob(sum_logp[:pairs], mean[:pairs], count[:pairs])
    return chosen, SequenceLogprob(sum_logp[pairs:], mean[pairs:], count[pairs:])


def reference_total(op: str, arg: str, ref: Tensor | SequenceLogprob, pairs: int, like: Tensor) -> Tensor:
    """The reference's total log-probs [P] of one side, checked and detached."""
    total = ref.total if isinstance(ref, SequenceLogprob) else ref
    check.check_per_pair(op, arg, total, pairs, like)
    return total.detach()
