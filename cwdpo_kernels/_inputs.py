"""From public arguments to op arguments: validation, autocast, and the selection of labeled tokens.

Shapes as in `functional`; M labeled tokens of N.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import validation as check
from .ops import apply, kept_bytes
from .types import Head, MemoryBudget

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class LabeledTokens:
    """The tokens that an op projects: hidden [M, D], labels [M], and where they come from.

    `rows` [M] are their flat indices in a batch of `shape`; None: all tokens, in order.
    """

    hidden: Tensor
    head: Head
    labels: Tensor
    rows: Tensor | None
    shape: torch.Size

    def scatter(self, values: Tensor) -> Tensor:
        """Values [M] of the tokens back in the batch's shape, 0 elsewhere."""
        if self.rows is None:
            return values.view(self.shape)
        return values.new_zeros(self.shape.numel()).index_copy(0, self.rows.long(), values).view(self.shape)


def labeled_tokens(
    op: str, hidden: Tensor, head: Head | Tensor, labels: Tensor, rows: Tensor | None, ignore_index: int
) -> LabeledTokens:
    """Check the arguments of a linear op and gather the tokens to project.

    In a compiled graph, and under vmap over labels, all tokens are gathered, because the number of labeled ones would
    be a data-dependent shape; the op itself then skips ignored tokens.
    """
    head = as_head(op, "head", head)
    if any(is_dtensor(x) for x in (hidden, head.weight, head.bias, labels)):
        from ._vocab_parallel import local_part

        hidden, head, labels = local_part(op, hidden, head, labels)
    hidden, head = autocast(hidden, head)
    check.check_head(op, hidden, head)
    check.check_labels(op, labels, hidden, "hidden", head.vocab, ignore_index)
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if rows is not None:
        check.check_rows(op, rows, labels)
    elif not torch.compiler.is_compiling() and labels.device.type != "meta" and not check.is_batched(labels):
        rows = (flat_labels != ignore_index).nonzero().squeeze(1)
        rows = None if rows.numel() == labels.numel() else rows
    if rows is not None:
        flat_hidden, flat_labels = select_rows(flat_hidden, rows), flat_labels.index_select(0, rows)
    return LabeledTokens(flat_hidden, head, flat_labels, rows, labels.shape)


def select_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[rows] [M, D], where `rows` are all different."""
    if torch.compiler.is_compiling():  # Dynamo traces no autograd.Function with a `jvp`
        return hidden.index_select(0, rows)
    return _SelectRows.apply(hidden, rows)


class _SelectRows(torch.autograd.Function):
    """`select_rows`, with a gradient that copies rows.

    The gradients of indexing and of index_select add them up: on a GPU with a sort or with atomics, on a CPU in ten
    parallel loops.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, rows: Tensor) -> Tensor:
        return hidden.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        hidden, rows = inputs
        ctx.tokens = hidden.shape[0]
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.tokens, *grad.shape[1:]).index_put_((rows.long(),), grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (rows,) = ctx.saved_tensors
        return tangent.index_select(0, rows)


def needs_gradient(tokens: LabeledTokens) -> tuple[bool, bool]:
    """Whether hidden or the head needs a gradient, and whether the head does."""
    trainable = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head_parameters(tokens.head))
    return trainable or (torch.is_grad_enabled() and tokens.hidden.requires_grad), trainable


def token_logprob(
    op: str, hidden: Tensor, head: Head | Tensor, labels: Tensor, rows: Tensor | None, budget: MemoryBudget,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """`functional.linear_logprob`. `op` is the name used in error messages.

    In a compiled graph without `rows`, where ignored tokens were not left out, a GPU runs kernels that skip them.
    """
    check_budget(op, budget)
    tokens = labeled_tokens(op, hidden, head, labels, rows, ignore_index)
    sparse_grad = tokens.rows is None and torch.compiler.is_compiling()
    head = tokens.head
    if head.shard is not None:
        return tokens.scatter(sharded(op, tokens, budget, ignore_index)[0])
    has_gradient, trainable = needs_gradient(tokens)
    frozen = has_gradient and not trainable
    kept = kept_bytes(tokens.hidden, head.weight, head.softcap, budget.kept_bytes) if trainable else 0
    logp, *_ = apply(
        "linear_logprob", hidden=tokens.hidden, weight=head.weight, bias=head.bias, labels=tokens.labels,
        scale=float(head.scale),
        softcap=head.softcap, ignore_index=ignore_index, with_direction=frozen, sparse_grad=sparse_grad,
        workspace_bytes=workspace_bytes(budget), kept_bytes=kept,
    )  # fmt: skip
    return tokens.scatter(logp)


def sharded(op: str, tokens: LabeledTokens, budget: MemoryBudget, ignore_index: int) -> tuple[Tensor, ...]:
    """The fields of TokenStats [M] for a head that is split over processes."""
    from ._vocab_parallel import Options, sharded_stats  # torch.distributed takes time to import

    head = tokens.head
    kept = kept_bytes(tokens.hidden, head.weight, head.softcap, budget.kept_bytes or 0, of_logits=True)
    transform = (float(head.scale), head.softcap)
    options = Options(op, head.shard, *transform, ignore_index, workspace_bytes(budget), kept)  # type: ignore[arg-type]
    return sharded_stats(tokens.hidden, head, tokens.labels, options)


def labels_in_rows(op: str, labels: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """`labels`, with those outside `rows` ignored, so that counts and means agree with the log-probs."""
    if rows is None:
        return labels
    check.check_dtype(op, "labels", labels, check.INDEX_DTYPES)
    check.check_ignore_index(op, ignore_index, labels)
    check.check_rows(op, rows, labels)
    flat = labels.reshape(-1)
    return torch.full_like(flat, ignore_index).index_copy(0, rows.long(), flat[rows]).view(labels.shape)


def check_budget(op: str, budget: MemoryBudget) -> None:
    kind = type(budget).__name__
    check.expect(isinstance(budget, MemoryBudget), op, "budget", "type", "MemoryBudget", kind)


def workspace_bytes(budget: MemoryBudget) -> int:
    """The workspace as ops take it: 0 leaves the size to the backend."""
    return budget.workspace_bytes or 0


def sequence_offsets(op: str, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`cu_seqlens` as given (packed), or the offsets of a padded [S, T] batch."""
    if cu_seqlens is not None:
        check.check_cu_seqlens(op, cu_seqlens, labels)
        return cu_seqlens
    shape = list(labels.shape)
    check.expect(labels.dim() == 2, op, "labels", "shape", "[S, T], or [N] with cu_seqlens", shape)
    return torch.arange(shape[0] + 1, device=labels.device) * shape[1]


def as_head(op: str, arg: str, head: Head | Tensor) -> Head:
    """`head`, or the Head of a bare weight [V, D]."""
    if isinstance(head, Tensor):
        head = Head(head)
    check.expect(isinstance(head, Head), op, arg, "type", "Head or Tensor [V, D]", type(head).__name__)
    return head


def whole_head(op: str, arg: str, head: Head | Tensor) -> Head:
    """`as_head`, for ops that need the whole vocabulary in one process."""
    head = as_head(op, arg, head)
    if head.shard is not None or is_dtensor(head.weight):
        raise NotImplementedError(f"{op}: {arg} split over processes is not supported, only a whole head is")
    return head


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor. Does not import torch.distributed.tensor: without it there are none."""
    return type(tensor).__name__ == "DTensor"


def head_parameters(head: Head) -> list[Tensor]:
    """The head's weight and, if it has one, bias."""
    return [head.weight] if head.bias is None else [head.weight, head.bias]


def autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """`hidden` and `head` in the dtype of the enclosing autocast region, as torch's linear would cast them.

    Unchanged outside such a region. Like torch, float64 is never cast.
    """
    device_type = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch raises for the device meta
        return hidden, head
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    bias = None if head.bias is None else cast(head.bias)
    return cast(hidden), replace(head, weight=cast(head.weight), bias=bias)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of the computation: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def detached(tensor: MaybeTensor) -> MaybeTensor:
    """`tensor` without its graph; anything else as it is."""
    return tensor.detach() if isinstance(tensor, Tensor) else tensor
