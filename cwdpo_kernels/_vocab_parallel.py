"""Heads that are split over processes by vocabulary: statistics of the whole distribution from every process's part.

Every process has the same hidden states [M, D] and labels [M], and one part of the weight, [V_r, D]. It sums over its
part (softmax_sums with `partial`), and two all-reduces merge the sums: one of M maxima, one of up to 5 M sums. Backward
needs one of the gradient of hidden [M, D].

The sums of a part are relative to its own maximum. They are merged relative to the maximum of all parts; see
`sums_relative_to` in portable/stats.py, and `factors_relative_to` for the way back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ._ops import ops
from .ops import token_stats
from .ops.autograd import first_derivative, one_by_one, refuse_forward_mode
from .types import Head, TokenStats, VocabShard
from .validation import expect, fail, may_read

MAX_LOGIT = token_stats.SUMS.index("max_logit")
IGNORED, ELSEWHERE = -1, -2  # labels of a part: an ignored token, and an entry that another part has
FIELDS = len(TokenStats._fields)
DIFFERENTIABLE = [TokenStats._fields.index(name) for name in ("logp", "entropy", "logsumexp")]


class Options(NamedTuple):
    """What a call passes on beside tensors; `op` is the name in error messages."""

    op: str
    shard: VocabShard
    scale: float
    softcap: float | None
    ignore_index: int
    workspace_bytes: int
    kept_bytes: int


def sharded_stats(hidden: Tensor, head: Head, labels: Tensor, options: Options) -> tuple[Tensor, ...]:
    """The fields of TokenStats [M] of the whole vocabulary; 0 where ignored. The same in every process of the group."""
    function = _CompiledStats if torch.compiler.is_compiling() else _ShardedStats
    return function.apply(hidden, head.weight, head.bias, labels, options)[:FIELDS]


def local_part(op: str, hidden: Tensor, head: Head, labels: Tensor) -> tuple[Tensor, Head, Tensor]:
    """This process's part of a head whose weight may be a DTensor, with hidden and labels as plain tensors."""
    if not isinstance(head.weight, DTensor):
        expect(not isinstance(head.bias, DTensor), op, "head.bias", "type", "Tensor (as head.weight)", "DTensor")
        return _plain(op, "hidden", hidden), head, _plain(op, "labels", labels)
    weight, bias = head.weight, head.bias
    expect(head.shard is None, op, "head.shard", "value", "None (head.weight is a DTensor)", head.shard)
    mesh, placements = weight.device_mesh, weight.placements
    sharded = placements == (Shard(0),)
    ok = sharded or placements == (Replicate(),)
    expect(ok, op, "head.weight", "placements", "(Shard(0),) or (Replicate(),) over one mesh dimension", placements)
    if isinstance(bias, DTensor):
        expected = f"{placements} (as head.weight)"
        expect(bias.placements == placements, op, "head.bias", "placements", expected, bias.placements)
        bias = bias.to_local()
    elif bias is not None:
        expect(not sharded, op, "head.bias", "type", "DTensor (as head.weight)", type(bias).__name__)
    shard = None
    if sharded:
        group, vocab = mesh.get_group(), weight.shape[0]
        largest_part = -(-vocab // dist.get_world_size(group))  # DTensor splits as torch.chunk does
        shard = VocabShard(group, min(dist.get_rank(group) * largest_part, vocab), vocab)
    head = replace(head, weight=weight.to_local(), bias=bias, shard=shard)
    return _plain(op, "hidden", hidden), head, _plain(op, "labels", labels)


def _plain(op: str, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as every process has it."""
    if not isinstance(tensor, DTensor):
        return tensor
    ok = all(placement == Replicate() for placement in tensor.placements)
    expect(ok, op, name, "placements", "Replicate() on all mesh dimensions", tensor.placements)
    return tensor.to_local()


class _CompiledStats(torch.autograd.Function):
    """For compiled graphs: without `jvp`, which torch.compile does not trace."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: Options
    ) -> tuple[Tensor, ...]:
        if may_read(labels):
            _check_processes(options.op, options.shard, weight.shape[0], labels.numel())
        local_labels = labels_in_part(labels, options.shard.start, weight.shape[0], options.ignore_index)
        local, kept = _sums_of_part(hidden, weight, bias, local_labels, options)
        sums = _merged(options.op, local, labels, options.shard)
        ignored = labels == options.ignore_index
        fields = (field.masked_fill(ignored, 0) for field in token_stats.stats_of(sums, options.shard.size))
        return *fields, local[MAX_LOGIT], sums, kept, local_labels

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, *output[FIELDS:])
        ctx.mark_non_differentiable(*(output[i] for i in range(len(output)) if i not in DIFFERENTIABLE))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *grads)


class _ShardedStats(_CompiledStats):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return first_derivative(ctx.options.op, _gradients, ctx, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        refuse_forward_mode(ctx.options.op)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        return one_by_one(_ShardedStats.apply, info.batch_size, in_dims, args)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, max_logit, sums, kept, local_labels = ctx.saved_tensors
    options: Options = ctx.options
    ignored = labels == options.ignore_index
    upstream = (grads[i] for i in DIFFERENTIABLE)
    given = (torch.zeros_like(sums[0]) if x is None else x.masked_fill(ignored, 0) for x in upstream)
    grad_target, *factors = (factor * options.scale for factor in token_stats.gradient_factors(sums, *given))
    exp_and_log = token_stats.factors_relative_to(max_logit, sums[MAX_LOGIT], *factors)
    needs = ctx.needs_input_grad[:3]
    if weight.shape[0]:
        grad_hidden, grad_weight, grad_bias = ops.softmax_sums_backward(
            grad_target, *exp_and_log, hidden, weight, bias, local_labels, max_logit.contiguous(),
            kept.contiguous(), options.scale, options.softcap, IGNORED, True, *needs, options.workspace_bytes,
        )  # fmt: skip
    else:
        empty = (None if x is None else torch.zeros_like(x) for x in (hidden, weight, bias))
        grad_hidden, grad_weight, grad_bias = empty
    if needs[0] and options.shard.reduce_grad_hidden:
        total = grad_hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = _SumOverProcesses.apply(total, options.shard.group).to(hidden.dtype)
    results = zip((grad_hidden, grad_weight, grad_bias), needs, strict=True)
    return *(grad if need else None for grad, need in results), None, None


class _SumOverProcesses(torch.autograd.Function):
    """An all-reduce of the sum, which vmap can batch."""

    @staticmethod
    def forward(total: Tensor, group: Any) -> Tensor:
        total = total.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, total: Tensor, group: Any) -> tuple[Tensor, int]:
        return _SumOverProcesses.apply(total, group), in_dims[0]


def labels_in_part(labels: Tensor, start: int, size: int, ignore_index: int) -> Tensor:
    """Labels counted from `start`, the first of the part's `size` entries; or IGNORED, or ELSEWHERE in another part.

    `ignore_index` itself cannot mark them: it may be the number of an entry of the part.
    """
    local = labels.long() - start
    local = torch.where((local >= 0) & (local < size), local, ELSEWHERE)
    return torch.where(labels == ignore_index, IGNORED, local)


def _check_processes(op: str, shard: VocabShard, part: int, tokens: int) -> None:
    """Check that all processes have as many tokens, and that their parts are the whole vocabulary, without overlap.

    On a CPU only, where the exchange costs little. Different numbers of tokens would end the process inside gloo.
    """
    own = torch.tensor([tokens, shard.start, part, shard.size], device="cpu")
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(gathered, own, group=shard.group)
    counts, starts, parts, sizes = zip(*(row.tolist() for row in gathered), strict=True)
    same = "the same in all processes of head.shard.group"
    expect(len(set(counts)) == 1, op, "labels", "number of tokens", same, list(counts))
    expect(len(set(sizes)) == 1, op, "head.shard", "size", same, list(sizes))
    spans = sorted((start, start + length) for start, length in zip(starts, parts, strict=True))
    ends = [0, *(stop for _, stop in spans)]
    ok = ends[-1] == shard.size and all(start == end for (start, _), end in zip(spans, ends, strict=False))
    expect(ok, op, "head.shard", "parts", f"that cover [0, {shard.size}) without overlap", spans)


def _sums_of_part(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, local_labels: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """The sums [6, M] over this process's part, and the kept tiles. A part may be empty (V_r = 0)."""
    if not weight.shape[0]:
        return token_stats.sums_of_nothing(hidden), hidden.new_empty(0, dtype=torch.uint8)
    sums, _, kept = ops.softmax_sums(
        hidden, weight, bias, local_labels, options.scale, options.softcap, IGNORED, True, False,
        options.workspace_bytes, options.kept_bytes,
    )  # fmt: skip
    return sums, kept


def _merged(op: str, local: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """The sums [6, M] over all parts."""
    target, max_logit, *_, sum_logit = local
    # The labels travel along, so that processes with different tokens (data parallelism) are noticed.
    checked = torch.stack([max_logit, labels.to(max_logit), -labels.to(max_logit)])
    dist.all_reduce(checked, dist.ReduceOp.MAX, group=shard.group)
    differ = checked[1] != -checked[2]
    if may_read(labels) and bool(differ.any()):
        fail(op, "labels", "values", "the same in all processes of head.shard.group", "different ones")
    merged = torch.stack([target, *token_stats.sums_relative_to(checked[0], local), sum_logit])
    dist.all_reduce(merged, group=shard.group)
    target = merged[0].masked_fill(differ, torch.nan)  # on a GPU, where raising an error would wait for it
    return torch.stack([target, checked[0], *merged[1:]])
