"""token_stats: statistics of each token's distribution, of which logp, entropy and logsumexp have gradients.

The op has one kernel for all backends: it takes the sums of softmax_sums, and portable/stats.py has the formulas. Saved
for backward: hidden, weight, bias, labels, `sums` [6, N] and the kept tiles. Backward recomputes the tiles that were
not kept. In units of 1G = 2 N D V floating-point operations, that is 3G in all for a frozen head. Computing the
gradients in forward would take as much, because those of logp and entropy need a sum of weight rows each. A trainable
head takes 4G, or 3G if all tiles were kept.

`with_direction` (frozen heads only): forward also computes the direction [N, D] of linear_logprob, 2G, and the gradient
of logp alone scales its rows. A gradient of the entropy or of logsumexp recomputes all tiles, 4G in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..portable.softmax_sums import SUMS
from ..portable.stats import factors_relative_to, gradient_factors, stats_of, sums_of_nothing, sums_relative_to
from ..portable.tiles import compute_dtype, new_direction
from .kept_tiles import backward_from_kept, kept_like
from .linear_logprob import FROM_DIRECTION, expect_frozen, from_direction
from .schema import Values, arguments, define, register_autograd, register_fake

define(
    "token_stats",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "bool with_direction, SymInt workspace_bytes, SymInt? kept_bytes) -> (Tensor logp, Tensor entropy, "
    "Tensor top1_prob, Tensor is_top1, Tensor logsumexp, Tensor log_sum_sq_probs, Tensor mean_logit, Tensor sums, "
    "Tensor direction, Tensor kept)",
)
__all__ = ["SUMS", "factors_relative_to", "gradient_factors", "stats_of", "sums_of_nothing", "sums_relative_to"]
DIFFERENTIABLE = ("logp", "entropy", "logsumexp")


@register_fake("token_stats")
def _(*, hidden, weight, labels, with_direction, kept_bytes, **_):
    sums = hidden.new_empty((len(SUMS), *labels.shape), dtype=compute_dtype(hidden.dtype))
    fields = [hidden.new_empty(labels.shape, dtype=sums.dtype) for _ in range(7)]
    fields[3] = torch.empty_like(fields[3], dtype=torch.bool)
    return *fields, sums, new_direction(hidden, with_direction), kept_like(hidden, weight, kept_bytes)


def token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float | None,
    ignore_index: int, with_direction: bool, workspace_bytes: int, kept_bytes: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of TokenStats [N] (0 where ignored), sums [6, N], direction [N, D] (or empty) and kept tiles."""
    sums, direction, kept = ops.softmax_sums(
        hidden, weight, bias, labels, scale, softcap, ignore_index, False, with_direction, workspace_bytes, kept_bytes
    )
    logp, entropy, top1_prob, is_top1, *others = stats_of(sums, weight.shape[0])
    labelled = labels != ignore_index  # the other statistics are 0 where all sums are
    return logp, entropy, top1_prob * labelled, is_top1 & labelled, *others, sums, direction, kept


def _saves(values: Values) -> Iterable[str]:
    of_direction: tuple[str, ...] = ()
    if values["with_direction"]:
        expect_frozen("token_stats", values)
        of_direction = FROM_DIRECTION
    return "with_direction", "sums", "kept_bytes", *of_direction, *arguments("softmax_sums_backward")


def _backward(ctx: Any, values: Values) -> Values:
    if values["with_direction"] and values["grad_entropy"] is None and values["grad_logsumexp"] is None:
        return from_direction(values)
    sums, labels = values["sums"].contiguous(), values["labels"]  # saved-tensor hooks may change the layout
    grads = [values[f"grad_{name}"] for name in DIFFERENTIABLE]
    ignored = labels == values["ignore_index"]
    grads = [torch.zeros_like(sums[0]) if grad is None else grad.masked_fill(ignored, 0) for grad in grads]
    factors = gradient_factors(sums, *grads)
    names = ("grad_target", "exp_factor", "log_factor")
    values |= {name: factor * values["scale"] for name, factor in zip(names, factors, strict=True)}
    values |= {"max_logit": sums[SUMS.index("max_logit")], "partial": False}
    return backward_from_kept(ctx, "softmax_sums_backward", values)


torch.library.impl(add_op_namespace_prefix("token_stats"), "default", token_stats)
register_autograd("token_stats", differentiable=DIFFERENTIABLE, saves=_saves, backward=_backward)
