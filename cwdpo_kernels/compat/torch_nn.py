"""`torch.nn.functional.linear_cross_entropy` (torch 2.13), without logits and with exact gradients.

Before:

    from torch.nn.functional import linear_cross_entropy

After:

    from cwdpo_kernels.compat.torch_nn import linear_cross_entropy
"""

from __future__ import annotations

from torch import Tensor

from .. import IGNORE_INDEX, Head, linear_logprob
from .._smoothing import lead_over_mean_logit
from ..validation import check_number, expect
from .reduction import check_reduction, reduced

OP = "linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
) -> Tensor:
    """Cross entropy of softmax(input @ linear_weight.T + linear_bias) with class indices, in nats.

    input [D] or [N, D], linear_weight [V, D], target [] or [N] (int64), linear_bias [V] -> [], or target's shape if
    unreduced. The result is float32 (float64 for float64 inputs), also where torch rounds to the input's dtype. Losses
    are 0 where target is `ignore_index` (None: -100); "mean" leaves them out, and is NaN if no token is left, as in
    torch. The loss is

        -log p_y + label_smoothing * (z_y - mean_v z_v),  mean_v z_v = input . mean(linear_weight) + mean(linear_bias)

    With smoothing, the head's gradient in half precision is the sum of two rounded terms, which cancel at the label if
    `label_smoothing` is close to 1.

    NotImplementedError: `options` (torch's chunking), class weights, targets that are probabilities, a K-dimensional
    loss.
    """
    if options is not None:
        raise NotImplementedError(f"{OP}: options are not supported (memory is bounded without torch's chunking)")
    if weight is not None:
        raise NotImplementedError(f"{OP}: weight (a factor for each class) is not supported")
    for name, tensor in (("linear_weight", linear_weight), ("target", target)):
        expect(isinstance(tensor, Tensor), OP, name, "type", "Tensor", type(tensor).__name__)
    if target.is_floating_point():
        raise NotImplementedError(f"{OP}: target must hold class indices; class probabilities are not supported")
    if linear_weight.dim() > 2:
        raise NotImplementedError(f"{OP}: linear_weight with more than 2 dimensions is not supported")
    check_reduction(OP, reduction)
    check_number(OP, "label_smoothing", label_smoothing, "between 0 and 1", 0, 1, prop="a value")
    ignored = IGNORE_INDEX if ignore_index is None else ignore_index
    head = Head(linear_weight, linear_bias)
    loss = -linear_logprob(input, head, target, ignore_index=ignored)
    counts = target != ignored
    if label_smoothing:
        loss = loss + label_smoothing * lead_over_mean_logit(input, head, target, ignored)
    return reduced(loss, counts, reduction)
