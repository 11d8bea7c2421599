"""The public functions: check the arguments, call the op, name the results.

Shapes: N tokens (`...` is any leading shape), S sequences, P pairs, D hidden, V vocabulary, T tokens of a padded row.
Labels are already aligned: hidden[t] predicts labels[t] (see `shift_labels`). Log-probabilities are in nats and
float32 (float64 for float64 inputs). Under autocast, the linear functions cast hidden and head to autocast's dtype, as
torch's own linear does; the logits are never rounded below float32.

Every function raises ValueError with the argument, what was expected and what it got. On a GPU the values of labels and
cu_seqlens are not read, because that would sync it: a label outside the vocabulary gives NaN for its token, and
cu_seqlens that do not rise from 0 to N give NaN for the whole call. Source of the method and the losses: CW-DPO, arXiv
2510.11978.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation as check
from ._inputs import (
    at_least_float32,
    autocast,
    check_budget,
    detached,
    labeled_tokens,
    labels_in_rows,
    needs_gradient,
    sequence_offsets,
    sharded,
    token_logprob,
    whole_head,
    workspace_bytes,
)
from ._ops import ops
from .ops import apply, kept_bytes
from .types import DEFAULT_BUDGET, IGNORE_INDEX, Divergence, Head, MemoryBudget, SequenceLogprob, TokenStats


def linear_logprob(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, *, rows: Tensor | None = None,
    budget: MemoryBudget = DEFAULT_BUDGET, ignore_index: int = IGNORE_INDEX,
) -> Tensor:  # fmt: skip
    """log softmax(head(hidden))[label] per token, without the logits: hidden [..., D], labels [...] -> [...].

    0 where the label is `ignore_index`. Differentiable in hidden, head.weight and head.bias. Forward and backward of
    a frozen head take 2 N D V multiply-adds in one pass, which saves N x D for backward; a trainable head takes 3 to
    4 N D V, depending on `budget`.

    rows [M]: flat indices of the labeled tokens, all different. Pass them to avoid a device sync (required for CUDA
        graphs). Labeled tokens outside `rows` count as ignored.
    """
    return token_logprob("linear_logprob", hidden, head, labels, rows, budget, ignore_index)


def logits_logprob(
    logits: Tensor, labels: Tensor, *, reuse_logits: bool = False, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """log softmax(logits)[label] per token: logits [..., V], labels [...] -> [...]; 0 where ignored.

    reuse_logits: backward overwrites the logits with their gradient. They must be contiguous, and backward can run
        only once (autograd raises on a second one).
    """
    op = "logits_logprob"
    check.check_dtype(op, "logits", logits, check.FLOAT_DTYPES)
    check.expect(logits.dim() >= 1, op, "logits", "dimensions", ">= 1", logits.dim())
    check.expect(logits.shape[-1] >= 1, op, "logits", "V", ">= 1", logits.shape[-1])
    check.check_labels(op, labels, logits, "logits", logits.shape[-1], ignore_index)
    check.check_flag(op, "reuse_logits", reuse_logits)
    ok = not reuse_logits or logits.is_contiguous()
    check.expect(ok, op, "logits", "layout", "contiguous (for reuse_logits)", "non-contiguous")
    flat = logits.reshape(-1, logits.shape[-1])
    logp, *_ = apply(
        "logits_logprob", logits=flat, labels=labels.reshape(-1), ignore_index=ignore_index, reuse_logits=reuse_logits
    )
    return logp.view(labels.shape)


def token_stats(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, *, rows: Tensor | None = None,
    budget: MemoryBudget = DEFAULT_BUDGET, ignore_index: int = IGNORE_INDEX, expect_entropy_grad: bool = True,
) -> TokenStats:  # fmt: skip
    """Statistics of softmax(head(hidden)) per token, without the logits: hidden [..., D], labels [...] -> [...] each.

    Entropy, the log-prob of the label and the log-sum-exp of the logits are differentiable in hidden, head.weight and
    head.bias; `TokenStats` says what the other fields are. `rows` and `budget` as in `linear_logprob`.

    One forward pass over the vocabulary (1 N D V multiply-adds) computes all fields. Backward takes 2 N D V for a
    frozen head and 3 N D V for a trainable one; tiles that `budget` keeps save up to 1 N D V (on a GPU, none are kept).

    `expect_entropy_grad=False` is for a frozen head whose entropy is only reported. It changes speed and memory, and no
    result beyond rounding: forward then computes the gradient of the log-prob, too, in 2 N D V, and keeps N D numbers
    for it; backward takes almost nothing. A gradient of the entropy or of the log-sum-exp, be it of zeros, is still
    right, but costs 2 N D V more, whatever `budget` keeps. The option has no effect on a trainable head, on one that is
    split over processes, and in a compiled graph.
    """
    op = "token_stats"
    check_budget(op, budget)
    check.check_flag(op, "expect_entropy_grad", expect_entropy_grad)
    tokens = labeled_tokens(op, hidden, head, labels, rows, ignore_index)
    head = tokens.head
    if head.shard is not None:
        return TokenStats(*(tokens.scatter(field) for field in sharded(op, tokens, budget, ignore_index)))
    has_gradient, trainable = needs_gradient(tokens)
    # In a compiled graph, an entropy that the graph returns has a gradient, be it of zeros.
    with_direction = has_gradient and not trainable and not expect_entropy_grad and not torch.compiler.is_compiling()
    kept = 0
    if has_gradient and not with_direction:
        kept = kept_bytes(tokens.hidden, head.weight, head.softcap, budget.kept_bytes, of_logits=True)
    stats = apply(
        op, hidden=tokens.hidden, weight=head.weight, bias=head.bias, labels=tokens.labels, scale=float(head.scale),
        softcap=head.softcap, ignore_index=ignore_index, with_direction=with_direction,
        workspace_bytes=workspace_bytes(budget), kept_bytes=kept,
    )  # fmt: skip
    return TokenStats(*(tokens.scatter(field) for field in stats[: len(TokenStats._fields)]))


def token_divergence(
    hidden_p: Tensor, head_p: Head | Tensor, hidden_q: Tensor, head_q: Head | Tensor, *,
    budget: MemoryBudget = DEFAULT_BUDGET,
) -> Divergence:  # fmt: skip
    """TV, JS and KL(p || q) per token between two heads: hidden_p [..., Dp], hidden_q [..., Dq] -> [...] each.

    The heads share the vocabulary and the dtype; D may differ. No gradient. A token costs four head products, so
    pass only the tokens of interest.
    """
    op = "token_divergence"
    check_budget(op, budget)
    hidden_p, head_p = autocast(detached(hidden_p), whole_head(op, "head_p", head_p))
    hidden_q, head_q = autocast(detached(hidden_q), whole_head(op, "head_q", head_q))
    check.check_head(op, hidden_p, head_p, "hidden_p", "head_p")
    check.check_head(op, hidden_q, head_q, "hidden_q", "head_q")
    check.check_device(op, "hidden_q", hidden_q, hidden_p, "hidden_p")
    expected_dtype = f"{hidden_p.dtype} (as hidden_p)"
    check.expect(hidden_q.dtype == hidden_p.dtype, op, "hidden_q", "dtype", expected_dtype, hidden_q.dtype)
    shape, vocab = list(hidden_p.shape[:-1]), head_p.weight.shape[0]
    check.expect(list(hidden_q.shape[:-1]) == shape, op, "hidden_q", "leading shape", shape, list(hidden_q.shape[:-1]))
    check.expect(head_q.weight.shape[0] == vocab, op, "head_q.weight", "V", vocab, head_q.weight.shape[0])
    sides: dict[str, Tensor | float | None] = {}
    for side, hidden, head in (("p", hidden_p, head_p), ("q", hidden_q, head_q)):
        sides[f"hidden_{side}"] = hidden.reshape(-1, hidden.shape[-1])
        sides[f"weight_{side}"], sides[f"bias_{side}"] = detached(head.weight), detached(head.bias)
        sides[f"scale_{side}"], sides[f"softcap_{side}"] = head.scale, head.softcap
    fields = ops.token_divergence(**sides, workspace_bytes=workspace_bytes(budget))
    return Divergence(*(field.view(hidden_p.shape[:-1]) for field in fields))


def sequence_logprob(
    token_logp: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX
) -> SequenceLogprob:
    """Total, mean and count per sequence, of padded token_logp [S, T] or packed [N] with cu_seqlens [S + 1].

    Ignored tokens do not count, whatever their value. `total` and `mean` are differentiable; an empty sequence has
    mean 0 and no gradient.
    """
    op = "sequence_logprob"
    check.check_dtype(op, "token_logp", token_logp, check.FLOAT_DTYPES)
    check.check_dtype(op, "labels", labels, check.INDEX_DTYPES)
    check.check_ignore_index(op, ignore_index, labels)
    check.expect(labels.shape == token_logp.shape, op, "labels", "shape", list(token_logp.shape), list(labels.shape))
    check.check_device(op, "labels", labels, token_logp, "token_logp")
    offsets = sequence_offsets(op, labels, cu_seqlens)
    flat, flat_labels = at_least_float32(token_logp).reshape(-1), labels.reshape(-1)
    fields = apply(op, logp=flat, labels=flat_labels, cu_seqlens=offsets, ignore_index=ignore_index)
    return SequenceLogprob(*fields)


def linear_sequence_logprob(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, *,
    rows: Tensor | None = None, budget: MemoryBudget = DEFAULT_BUDGET, ignore_index: int = IGNORE_INDEX,
) -> SequenceLogprob:  # fmt: skip
    """Total and mean log-prob of every sequence from hidden states, fused; gradients to hidden and head.

    hidden [S, T, D] with labels [S, T], or packed [N, D] with labels [N] and cu_seqlens [S + 1]. `rows` as in
    `linear_logprob`.
    """
    op = "linear_sequence_logprob"
    labels = labels_in_rows(op, labels, rows, ignore_index)
    token_logp = token_logprob(op, hidden, head, labels, rows, budget, ignore_index)
    return sequence_logprob(token_logp, labels, cu_seqlens, ignore_index=ignore_index)


def logits_sequence_logprob(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, *, reuse_logits: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> SequenceLogprob:  # fmt: skip
    """`linear_sequence_logprob` from logits [S, T, V] or packed [N, V]; `reuse_logits` as in `logits_logprob`."""
    token_logp = logits_logprob(logits, labels, reuse_logits=reuse_logits, ignore_index=ignore_index)
    return sequence_logprob(token_logp, labels, cu_seqlens, ignore_index=ignore_index)


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Align labels in Hugging Face's convention (labels[t] is token t), so that hidden[t] predicts labels[t].

    labels [..., T], or packed [N] with cu_seqlens [S + 1]. The last token of every sequence predicts nothing: its
    label becomes `ignore_index`.
    """
    op = "shift_labels"
    check.check_dtype(op, "labels", labels, check.INDEX_DTYPES)
    check.check_ignore_index(op, ignore_index, labels)
    check.expect(labels.dim() >= 1, op, "labels", "dimensions", ">= 1", labels.dim())
    shifted = torch.nn.functional.pad(labels[..., 1:], (0, min(labels.shape[-1], 1)), value=ignore_index)
    if cu_seqlens is None:
        return shifted
    check.check_cu_seqlens(op, cu_seqlens, labels)
    # An empty first sequence ends at -1. Send it to an extra slot behind the tokens, which the last line cuts off.
    ends = torch.where(cu_seqlens[1:] > 0, cu_seqlens[1:] - 1, labels.shape[0]).long()
    padded = torch.nn.functional.pad(shifted, (0, 1))
    return padded.index_fill(0, ends, ignore_index)[:-1]
