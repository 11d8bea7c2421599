"""apple/ml-cross-entropy's `linear_cross_entropy`, for any device, with logits never rounded below float32.

Before:

    from cut_cross_entropy import linear_cross_entropy

After:

    from cwdpo_kernels.compat.cut_cross_entropy import linear_cross_entropy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import IGNORE_INDEX, Head, VocabShard, linear_logprob, token_stats
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
    vocab_parallel_options: Any = None,
    **unsupported: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of softmax(softcap(e @ c.T + bias)), in nats: e [..., D], c [V, D], targets [...], bias [V].

    The result is float32 (float64 for float64). Unreduced losses are 0 where the target is `ignore_index`; "mean"
    averages the others (NaN if there are none).

    shift: s (True means 1): e[..., t, :] predicts targets[..., t + s]. Unreduced results are s shorter in the last
        dimension.
    bias: versions up to 25.1 lack this argument, so pass everything after `targets` by name.

    return_lse: also return the log-sum-exp of the logits per token, 0 where ignored, with its gradient (for a z-loss).
        It is never reduced.
    vocab_parallel_options: cut-cross-entropy's `VocabParallelOptions`: c and bias are the part [start, stop) of the
        vocabulary, and `group` the processes that have the others. Targets count over the whole vocabulary.

    NotImplementedError: `impl`; values of `filter_eps`, `filter_e_grad`, ... that ask for filtered gradients, because
    gradients are exact here (None and the values of `SATISFIED` are accepted).
    """
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
    head = Head(c, bias, softcap=softcap, shard=_shard(vocab_parallel_options, c))
    labeled = targets != ignore_index
    if not return_lse:
        return reduced(-linear_logprob(e, head, targets, ignore_index=ignore_index), labeled, reduction)
    stats = token_stats(e, head, targets, ignore_index=ignore_index)
    return reduced(-stats.logp, labeled, reduction), stats.logsumexp


def _shard(options: Any, part: Tensor) -> VocabShard | None:
    """The part of the vocabulary that `VocabParallelOptions` describe. Its size is known after a sum over the group."""
    if options is None:
        return None
    rows = options.stop - options.start
    expect(part.shape[0] == rows, OP, "c", "V", f"{rows} (stop - start of vocab_parallel_options)", part.shape[0])
    size = torch.tensor(rows, device=part.device)
    torch.distributed.all_reduce(size, group=options.group)
    return VocabShard(options.group, options.start, int(size), options.reduce_e_grad)
