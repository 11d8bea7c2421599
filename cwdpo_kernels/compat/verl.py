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

from .. import Head, VocabShard, token_stats
from ..validation import check_positive, expect, is_number
from .reduction import check_reduction, reduced

OP = "linear_cross_entropy"
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

    Both have exact gradients.

    dist_process_group: the processes that have a part of the vocabulary each, in the order of their ranks and of equal
        size, with the same hidden and labels (counted over the whole vocabulary). As in verl, the gradient of hidden is
        that of this process's part: the caller sums it over the processes.
    """
    expect(is_number(temperature), OP, "temperature", "type", "float", type(temperature).__name__)
    check_positive(OP, "temperature", temperature, "a value")
    check_reduction(OP, reduction)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        expect(isinstance(tensor, Tensor), OP, name, "type", "Tensor", type(tensor).__name__)
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    shard = None
    if dist_process_group is not None and (processes := dist_process_group.size()) > 1:
        part = weight.shape[0]
        start, size = dist_process_group.rank() * part, processes * part
        shard = VocabShard(dist_process_group, start, size, reduce_grad_hidden=False)
    head = Head(weight, scale=1.0 / temperature, shard=shard)
    logp, entropy, *_ = token_stats(flat_hidden, head, flat_labels, ignore_index=NO_LABEL)
    return reduced(logp, flat_labels != NO_LABEL, reduction), entropy
