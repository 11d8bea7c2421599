"""The signature of apple/ml-cross-entropy's `linear_cross_entropy`, for any device, with logits never below float32.

before:
    from cut_cross_entropy import linear_cross_entropy
after:
    from cwdpo_kernels.compat.cut_cross_entropy import linear_cross_entropy
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import Head, linear_logprob
from ..validation import expect
from .reduction import check_reduction, reduced

OP = "linear_cross_entropy"


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    **unsupported: Any,
) -> Tensor:
    """Cross entropy of softmax(softcap(e @ c.T + bias)), in nats: e [..., D], c [V, D], targets [...], bias [V].

    `shift` s (True: 1): e[..., t, :] predicts targets[..., t + s], and unreduced results are s shorter in their last
    dimension. float32 (float64 for float64). Unreduced losses are 0 where the target is `ignore_index`; "mean" is over
    the others, NaN if there are none.

    Versions up to 25.1 have no `bias`: pass what comes after `targets` by name. Gradients are exact, so what tunes
    their filtering (`filter_eps`, `accum_e_fp32`, ...) and `impl` raise NotImplementedError, by name, unless None. So
    does `return_lse`: as a difference of the label's logit and log-prob its gradient would lose digits at the label.
    """
    if return_lse:
        raise NotImplementedError(f"{OP}: return_lse=True is not supported")
    for name, value in unsupported.items():
        if value is not None:
            raise NotImplementedError(f"{OP}: {name}={value!r} is not supported")
    check_reduction(OP, reduction)
    is_tensor = bias is None or isinstance(bias, Tensor)
    expect(is_tensor, OP, "bias", "type", "Tensor or None (pass ignore_index by name)", type(bias).__name__)
    if shift:
        expect(targets.dim() >= 1, OP, "targets", "dimensions", ">= 1 (for shift)", targets.dim())
        length = targets.shape[-1]
        expect(0 <= shift < length, OP, "shift", "a value", f"between 0 and {length - 1} (as targets)", shift)
        e, targets = e[..., : length - int(shift), :], targets[..., int(shift) :]
    nll = -linear_logprob(e, Head(c, bias, softcap=softcap), targets, ignore_index=ignore_index)
    return reduced(nll, targets != ignore_index, reduction)
