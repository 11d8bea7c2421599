"""Hugging Face models on token trees: prompt and images are encoded once, however many answers are scored.

    enable_trees(model)
    batch = tree_batch(model, prompts, [chosen, rejected])  # prompts: the processor's outputs
    with token_tree(batch.tree):
        out = model(**batch.inputs, head_op=lambda hidden, head: linear_cwdpo_loss(
            batch.packed(hidden), head, batch.labels, ..., cu_seqlens=batch.cu_seqlens))

`enable_trees` registers an attention implementation with transformers and selects it for the language model:
`tree_sdpa` for a model that uses `sdpa`, and so on. Inside `token_tree` it calls
`cwdpo_kernels.trees.tree_attention`; outside, the original implementation. Vision towers keep their attention.

The registered mask function returns a `TreeMask` in place of a mask tensor. Layers receive it as an argument, so
gradient checkpointing recomputes a layer with the same tree.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .. import IGNORE_INDEX, Head, linear_logprob
from ..trees import TokenTree, tree_attention
from .hugging_face import rounding_tolerance
from .module_types import unwrapped

__all__ = [
    "TreeBatch", "TreeMask", "TreesUnsupported", "compare_forwards", "enable_trees", "token_tree", "tree_batch",
    "why_no_trees",
]  # fmt: skip

PREFIX = "tree_"
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")  # in the names of `config.layer_types`
_SUPPORTED = ("full_attention", "sliding_attention")  # `layer_types` whose masks `_window` can read
_UNSUPPORTED_OPTIONS = ("s_aux", "position_bias", "relative_position_bias")  # of attention functions
_CURRENT: ContextVar[TokenTree | None] = ContextVar("token_tree", default=None)


class TreesUnsupported(NotImplementedError):
    """The model cannot run on token trees; the message says why."""


class TreeBatch(NamedTuple):
    """Inputs of a model on one token axis of T tokens, and the labels that its hidden states predict.

    `inputs`: input_ids [1, T] and everything else the model's forward takes. `states` [N], int64: where on the token
    axis the hidden states are that predict `labels` [N], int64. `cu_seqlens` [S + 1], int64: bounds of the S answers in
    `labels`, group by group, so all chosen answers come before all rejected ones.
    """

    inputs: dict[str, Tensor]
    tree: TokenTree
    states: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def packed(self, hidden: Tensor) -> Tensor:
        """The hidden states [N, D] of the labels, from the model's [1, T, D]."""
        return hidden[0].index_select(0, self.states)

    def run(self, model: nn.Module, op: Callable[[Tensor, Head], Any]) -> Any:
        """The result of `op(hidden, head)` inside the forward of `model`; `hidden` [N, D] is aligned with `labels`."""
        with token_tree(self.tree):
            return model(**self.inputs, head_op=lambda hidden, head: op(self.packed(hidden), head))


@dataclass(frozen=True)
class TreeMask:
    """What a layer of the language model gets in place of a mask tensor.

    `window`: the layer's sliding window, None if it has none. `visible`: for some prompts, by the index of their root,
    which of its n tokens see which, bool [n, n]. Models whose image tokens attend to later ones need it.
    """

    tree: TokenTree
    window: int | None
    visible: dict[int, Tensor]
    _added: dict[torch.dtype, dict[int, Tensor]] = field(default_factory=dict, compare=False)
    # PaliGemma passes this mask to the mask function of its language model, which expects a tensor with ndim and shape.
    ndim: ClassVar[int] = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.tree.tokens, self.tree.tokens

    def added(self, dtype: torch.dtype) -> dict[int, Tensor]:
        """`visible` as masks to add to scores: 0 where a token is visible, else -inf."""
        if dtype not in self._added:
            self._added[dtype] = {
                root: torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
                for root, seen in self.visible.items()
            }
        return self._added[dtype]


@contextlib.contextmanager
def token_tree(tree: TokenTree) -> Iterator[None]:
    """Within this context, forwards interpret their token axis [1, T] as `tree`."""
    token = _CURRENT.set(tree)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class Answers(Protocol):
    """A batch of answers: padded, or on token trees (`TreeBatch`)."""

    @property
    def labels(self) -> Tensor: ...

    def run(self, model: nn.Module, op: Callable[[Tensor, Head], Any]) -> Any:
        """The result of `op(hidden, head)` inside the forward of `model`; `hidden` is aligned with `labels`."""


@torch.no_grad()
def compare_forwards(model: nn.Module, separate: Answers, shared: Answers) -> tuple[float, float]:
    """The largest difference between the log-probs of the same labels in two batches, and the tolerance, in nats.

    The tolerance allows for rounding: 1e-4 nats, or 4 eps max |log-prob| in the hidden states' dtype if that is larger.
    Both batches must have the same labels in the same order. Raises what the model raises, such as `TreesUnsupported`.
    """
    logp: list[Tensor] = []
    for batch in (separate, shared):

        def op(hidden: Tensor, head: Head, labels: Tensor = batch.labels) -> tuple[Tensor, torch.dtype]:
            return linear_logprob(hidden, head, labels), hidden.dtype

        values, dtype = batch.run(model, op)
        logp.append(values[batch.labels != IGNORE_INDEX])
    if not len(logp[0]):
        return 0.0, rounding_tolerance(0.0, dtype)
    tolerance = rounding_tolerance(logp[0].abs().max().item(), dtype)
    return (logp[0] - logp[1]).abs().max().item(), tolerance


def why_no_trees(wrapped: nn.Module) -> str | None:
    """Why a model cannot run on token trees, judging by its class and config. None if they show no reason.

    Peft or DDP may wrap the model. `compare_forwards` shows whether its log-probs are the same.
    """
    model: Any = unwrapped(wrapped)
    name, text = type(model).__name__, model.config.get_text_config()
    layers = sorted(set(getattr(text, "layer_types", None) or ()))
    recurrent = [kind for kind in layers if any(part in kind for part in _RECURRENT)]
    if recurrent or getattr(model, "_is_stateful", False):
        what = f" ({', '.join(recurrent)})" if recurrent else ""
        return f"{name} has layers with a recurrent state{what}, which cannot branch"
    others = [kind for kind in layers if "attention" in kind and kind not in _SUPPORTED]
    if others or getattr(text, "attention_chunk_size", None):
        return f"{name} has attention of another kind than full and sliding ({', '.join(others) or 'chunks'})"
    dropout = getattr(text, "attention_dropout", 0.0)
    if dropout:
        return f"{name} has a dropout of {dropout} in its attention (attention_dropout)"
    if getattr(text, "is_encoder_decoder", False) or getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder model"
    implementation = text._attn_implementation
    if implementation is None or not model._can_set_attn_implementation():
        return f"{name} does not take its attention from transformers' AttentionInterface"
    base = implementation.removeprefix(PREFIX)
    if base != "eager" and (base not in AttentionInterface() or base not in AttentionMaskInterface()):
        return f"{name} uses the attention {base!r}, which is not registered with transformers"
    return None


def enable_trees(model: nn.Module) -> None:
    """Let `model` run on token trees within `token_tree`. Peft may wrap the model.

    Raises `TreesUnsupported` if `why_no_trees` has a reason. A second call changes nothing.
    """
    reason = why_no_trees(model)
    if reason is not None:
        raise TreesUnsupported(reason)
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    base = config._attn_implementation
    if base.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + base, _attention(base))
    AttentionMaskInterface.register(PREFIX + base, _mask(AttentionMaskInterface()[base]))
    config._attn_implementation = PREFIX + base


def _attention(base: str) -> Callable[..., Any]:
    """An attention function with transformers' signature, which replaces the one registered as `base`."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, TreeMask):
            return _on_tree(module, query, key, value, attention_mask, base, **options), None
        return _original(base, module)(module, query, key, value, attention_mask, **options)

    return attention


def _original(base: str, module: nn.Module) -> Callable[..., Any]:
    if base != "eager":
        return AttentionInterface()[base]
    return sys.modules[type(module).__module__].eager_attention_forward  # each modeling file has its own


def _on_tree(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, base: str, *,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    name = type(module).__name__
    if dropout > 0:
        raise TreesUnsupported(f"{name} has a dropout of {dropout} in its attention")
    unsupported = [option for option in _UNSUPPORTED_OPTIONS if options.get(option) is not None]
    if unsupported:
        raise TreesUnsupported(f"{name} passes {', '.join(unsupported)} to its attention")
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    out = tree_attention(
        query, key, value, mask.tree, scale=scaling, window=mask.window,
        softcap=None if base == "sdpa" else softcap,  # sdpa ignores it
        masks=mask.added(query.dtype),
    )  # fmt: skip
    return out.transpose(1, 2)


def _mask(base: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function with transformers' signature that returns a `TreeMask` within `token_tree`."""

    def mask(
        *, mask_function: Callable[..., Any] = causal_mask_function, use_vmap: bool = False,
        device: torch.device | str = "cpu", **options: Any,
    ) -> Any:  # fmt: skip
        tree = _CURRENT.get()
        if tree is None:
            return base(mask_function=mask_function, use_vmap=use_vmap, device=device, **options)
        if isinstance(options.get("attention_mask"), TreeMask):
            return options["attention_mask"]
        if mask_function is causal_mask_function:
            return TreeMask(tree, None, {})

        def visible(rows: slice, columns: slice) -> Tensor:
            """Part of the model's own mask over the token axis, which it computes from indices."""
            seen: Any = sdpa_mask(
                1,
                rows.stop - rows.start,
                columns.stop - columns.start,
                rows.start,
                columns.start,
                mask_function=mask_function,
                use_vmap=use_vmap,
                device=device,
                allow_is_causal_skip=False,
            )
            return seen[0, 0]

        return TreeMask(tree, _window(tree, visible), _own_masks(tree, visible))

    return mask


def _window(tree: TokenTree, visible: Callable[[slice, slice], Tensor]) -> int | None:
    """The sliding window of a mask, from what the last token of the axis sees: its window, or all tokens (None).

    Raises `TreesUnsupported` if it sees anything else.
    """
    count = tree.tokens
    row = visible(slice(count - 1, count), slice(0, count))[0]
    seen = int(row.sum())
    if not bool(row[count - seen :].all()):
        raise TreesUnsupported("a mask that is neither causal nor a sliding window")
    return None if seen == count else seen


def _own_masks(tree: TokenTree, visible: Callable[[slice, slice], Tensor]) -> dict[int, Tensor]:
    """The model's own mask [n, n] of each root in which a token sees a later one, by the root's index."""
    own = {}
    for root, parent in enumerate(tree.parents):
        if parent == -1:
            seen = visible(tree.span(root), tree.span(root))
            if bool(seen.diagonal(1).any()):
                own[root] = seen
    return own


def tree_batch(
    model: nn.Module,
    prompts: Mapping[str, Tensor],
    answers: Sequence[Sequence[Sequence[int] | None]],
    answer_types: Mapping[str, int] = MappingProxyType({}),
) -> TreeBatch:
    """P prompts on one token axis, each followed by its answers.

    Args:
        model: runs the batch; it determines the positions
        prompts: a processor's outputs for P prompts: input_ids and attention_mask [P, L], padded on either side, and
            the images' entries, if any
        answers: groups of P answers, such as [chosen, rejected]. An answer is at least 1 token id, or None where a
            prompt has no answer in the group.
        answer_types: entries of `prompts` with the shape of input_ids, such as token_type_ids, and their value over the
            answers' tokens (default: 0)

    The last token of an answer is a label but not an input, because nothing is predicted from it.
    """
    ids, kept = prompts["input_ids"], prompts["attention_mask"].bool()
    lengths = kept.sum(1).tolist()
    of_prompt = [[tokens for tokens in column if tokens is not None] for column in zip(*answers, strict=True)]
    tree = TokenTree.of_answers(lengths, [[len(tokens) - 1 for tokens in each] for each in of_prompt])
    inputs: dict[str, Tensor] = {}
    for key, value in prompts.items():
        if value.shape != ids.shape:
            inputs[key] = image_entry(key, value, prompts)
            continue
        fill = {"attention_mask": 1, **answer_types}.get(key, 0)
        parts: list[Tensor] = []
        for row, each in enumerate(of_prompt):
            parts.append(value[row, kept[row]])
            for tokens in each:
                parts.append(value.new_tensor(tokens[:-1] if key == "input_ids" else [fill] * (len(tokens) - 1)))
        inputs[key] = torch.cat(parts).unsqueeze(0)
    inputs["position_ids"] = _positions(model, prompts, tree)
    segments = _segments(answers)
    ordered = [tokens for group in answers for tokens in group if tokens is not None]
    states = torch.cat([tree.predicting(segment) for segment in segments])
    labels = torch.tensor([token for tokens in ordered for token in tokens])
    bounds = torch.tensor([0, *map(len, ordered)]).cumsum(0)
    return TreeBatch(inputs, tree, *(each.to(ids.device) for each in (states, labels, bounds)))


def _segments(answers: Sequence[Sequence[Sequence[int] | None]]) -> list[int]:
    """The segment of each answer, ordered by group and then prompt. In the tree they are ordered by prompt."""
    by_answer: dict[tuple[int, int], int] = {}
    segment = 0
    for row in range(len(answers[0])):
        for group, column in enumerate(answers):
            if column[row] is not None:
                segment += 1
                by_answer[group, row] = segment
        segment += 1  # the next prompt
    return [by_answer[key] for key in sorted(by_answer)]


def image_entry(key: str, value: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
    """The images' entry `key` of P `prompts`, with the shape that a batch of one row needs.

    Idefics3 and SmolVLM have entries [P, images per row, ...], which become [1, P x images per row, ...]. They pad rows
    with fewer images, and the model removes the padding. All other entries stay as they are."""
    has_rows = "image_sizes" not in prompts and (
        (key == "pixel_values" and value.dim() == 5) or (key == "pixel_attention_mask" and value.dim() == 4)
    )
    return value.flatten(0, 1).unsqueeze(0) if has_rows else value


def _positions(model: nn.Module, prompts: Mapping[str, Tensor], tree: TokenTree) -> Tensor:
    """The position of each token on its path: [1, T], or [3, 1, T] for models with positions in three dimensions."""
    kept = prompts["attention_mask"].bool()
    plain = tree.positions(kept.device)
    found = rope_index(model, prompts)
    if found is None:
        return plain.unsqueeze(0)
    of_prompts, deltas = found
    positions = plain.expand(of_prompts.shape[0], -1).clone()
    row = -1
    for segment, parent in enumerate(tree.parents):
        if parent == -1:
            row += 1
            positions[:, tree.span(segment)] = of_prompts[:, row, kept[row]]
        else:
            positions[:, tree.span(segment)] += deltas[row]
    return positions.unsqueeze(1)


def rope_index(model: nn.Module, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """The multimodal (M-RoPE) positions [3, S, L] of S rows, and by how much the position after each row differs from
    the row's length: [S, 1]. None if the model has plain positions, or the rows have no images."""
    get_rope_index = getattr(unwrapped(model).base_model, "get_rope_index", None)
    grids = [name for name in ("image_grid_thw", "video_grid_thw") if rows.get(name) is not None]
    if get_rope_index is None or not grids or "mm_token_type_ids" not in rows:
        return None
    accepted = inspect.signature(get_rope_index).parameters
    return get_rope_index(**{key: value for key, value in rows.items() if key in accepted})
