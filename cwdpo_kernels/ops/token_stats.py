"""token_stats: statistics of each token's distribution, of which logp, entropy and logsumexp have gradients.

The op computes them from softmax_sums on every backend, so portable/token_stats.py has the only kernel. Saved for
backward: hidden, weight, bias, labels, `sums` [6, N] and the kept tiles. Backward recomputes the tiles that were not
kept: 3G of floating-point operations in all for a frozen head, 1G = 2 N D V. One pass could not take less, because the
gradients of logp and entropy need a sum of weight rows each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..portable.softmax_sums import SUMS
from ..portable.tiles import compute_dtype
from ..portable.token_stats import gradient_factors
from .kept_tiles import backward_from_kept, kept_like
from .schema import Values, arguments, define, register_autograd, register_fake

define(
    "token_stats",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float? softcap, int ignore_index, "
    "SymInt workspace_bytes, SymInt? kept_bytes) -> (Tensor logp, Tensor entropy, Tensor top1_prob, Tensor is_top1, "
    "Tensor logsumexp, Tensor log_sum_sq_probs, Tensor mean_logit, Tensor sums, Tensor kept)",
)
DIFFERENTIABLE = ("logp", "entropy", "logsumexp")


@register_fake("token_stats")
def _(*, hidden, weight, labels, kept_bytes, **_):
    sums = hidden.new_empty((len(SUMS), *labels.shape), dtype=compute_dtype(hidden.dtype))
    fields = [hidden.new_empty(labels.shape, dtype=sums.dtype) for _ in range(7)]
    fields[3] = torch.empty_like(fields[3], dtype=torch.bool)
    return *fields, sums, kept_like(hidden, weight, kept_bytes)


def _saves(values: Values) -> Iterable[str]:
    return "sums", "kept_bytes", *arguments("softmax_sums_backward")


def _backward(ctx: Any, values: Values) -> Values:
    sums, labels = values["sums"], values["labels"]
    grads = [values[f"grad_{name}"] for name in DIFFERENTIABLE]
    labelled = labels != values["ignore_index"]
    grads = [torch.zeros_like(sums[0]) if grad is None else grad.masked_fill(~labelled, 0) for grad in grads]
    factors = gradient_factors(sums, *grads)
    names = ("grad_target", "exp_factor", "log_factor")
    values |= {name: factor * values["scale"] for name, factor in zip(names, factors, strict=True)}
    values |= {"max_logit": sums[SUMS.index("max_logit")], "partial": False}
    return backward_from_kept(ctx, "softmax_sums_backward", values)


register_autograd("token_stats", differentiable=DIFFERENTIABLE, saves=_saves, backward=_backward)
