"""apple/ml-cross-entropy's `linear_cross_entropy`, for any device, with logits never rounded below float32.

Before:

    from cut_cross_entropy import linear_cross_entropy

After:

    from cwdpo_kernels.compat.cut_cross_entropy import linear_cross_entropy
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import IGNORE_INDEX, Head, linear_logprob
from ..validation import expect
from .reduction import check_reduction, reduced

OP = "linear_cross_entropy"
# Options of the gradient's accuracy, and the values besides None that this gradient satisfies: it is exact.
SATISFIED: dict[str, tuple[bool, ...]] = {
    "accum_e_fp32": (True, False), "accum_c_fp32": (True, False), "filter_e_grad": (False,), "filter_c_grad": (False,),
}  # fmt: skip


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    **unsupported: Any,
) -> Tensor:
    """Cross entropy of softmax(softcap(e @ c.T + bias)), in nats: e [..., D], c [V, D], targets [...], bias [V].

    The result is float32 (float64 for float64). Unreduced losses are 0 where the target is `ignore_index`; "mean"
    averages the others (NaN if there are none).

    shift: s (True means 1): e[..., t, :] predicts targets[..., t + s]. Unreduced results are s shorter in the last
        dimension.
    bias: versions up to 25.1 lack this argument, so pass everything after `targets` by name.

    NotImplementedError: `impl`; values of `filter_eps`, `filter_e_grad`, ... that ask for filtered gradients, because
    gradients are exact here (None and the values of `SATISFIED` are accepted); `return_lse`, because the gradient of
    the difference between the label's logit and its log-prob would lose digits at the label.
    """
    if return_lse:
        raise NotImplementedError(f"{OP}: return_lse=True is not supported")
    for name, value in unsupported.items():
        if value is not None and value not in SATISFIED.get(name, ()):
            raise NotImplementedError(f"{OP}: {name}={value!r} is not supported")
    check_reduction(OP, reduction)
    for name, tensor in (("e", e), ("targets", targets)):
        expect(isinstance(tensor, Tensor), OP, name, "type", "Tensor", type(tensor).__name__)
    is_tensor = bias is None or isinstance(bias, Tensor)
    expect(is_tensor, OP, "bias", "type", "Tensor or None (pass ignore_index by name)", type(bias).__name__)
    expect(isinstance(shift, int), OP, "shift", "type", "bool or int", type(shift).__name__)
    if shift:
        expect(targets.dim() >= 1, OP, "targets", "dimensions", ">= 1 (for shift)", targets.dim())
        length = targets.shape[-1]
        expect(0 <= shift < length, OP, "shift", "a value", f"between 0 and {length - 1} (as targets)", shift)
        e, targets = e[..., : length - int(shift), :], targets[..., int(shift) :]
    nll = -linear_logprob(e, Head(c, bias, softcap=softcap), targets, ignore_index=ignore_index)
    return reduced(nll, targets != ignore_index, reduction)
