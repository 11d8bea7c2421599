"""verl's fused linear cross entropy (0.4.1 and newer), for any device, with logits never rounded below float32.

Before:

    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

After:

    from cwdpo_kernels.compat.verl import linear_cross_entropy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import Head, linear_logprob, token_stats
from ..validation import check_positive, expect, is_number
from .reduction import check_reduction, reduced

OP = "linear_cross_entropy"
REFUSAL = f"{OP}: the gradient of entropy is not supported (entropy_coeff must be 0)"
NO_LABEL = torch.iinfo(torch.int32).min  # verl ignores no token


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs of the labels, entropies) of softmax(hidden @ weight.T / temperature), in nats.

    hidden [..., D], weight [V, D], labels [...], already aligned -> [N] each, flattened; float32 (float64 for
    float64). `reduction` applies to the N log-probs, never to the entropies. No label is ignored.

    Gradients of the log-probs are exact; the entropy has no gradient. If no gradient is needed, one forward pass
    computes both; otherwise the entropy costs a second one.

    NotImplementedError: backward through the entropy (verl's `entropy_coeff` other than 0; RuntimeError in a compiled
    graph), a `dist_process_group` of more than one process (the weight must hold the whole vocabulary).
    """
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise NotImplementedError(f"{OP}: dist_process_group (a head sharded over processes) is not supported")
    expect(is_number(temperature), OP, "temperature", "type", "float", type(temperature).__name__)
    check_positive(OP, "temperature", temperature, "a value")
    check_reduction(OP, reduction)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        expect(isinstance(tensor, Tensor), OP, name, "type", "Tensor", type(tensor).__name__)
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    head = Head(weight, scale=1.0 / temperature)
    logp, entropy, *_ = token_stats(flat_hidden, head, flat_labels, ignore_index=NO_LABEL)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logp = linear_logprob(flat_hidden, head, flat_labels, ignore_index=NO_LABEL)
    return reduced(logp, flat_labels != NO_LABEL, reduction), _Entropy.apply(entropy, hidden, weight)


class _Entropy(torch.autograd.Function):
    """The entropy as a function of hidden and weight, whose backward raises an error instead of returning zero."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor) -> tuple[None, None, None]:
        if not torch.compiler.is_compiling():
            raise NotImplementedError(REFUSAL)
        # A compiled graph traces this backward always, and runs it with zeros if the entropy is not used.
        torch._assert_async((grad_entropy == 0).all(), REFUSAL)
        return None, None, None
