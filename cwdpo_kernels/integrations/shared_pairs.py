"""Turns padded preference pairs into token trees: the common start of a pair's two rows stands on the token axis once.

    chosen row    prompt | chosen   | padding
    rejected row  prompt | rejected | padding        ->        prompt | chosen | rejected | next pair ...

`tree_of_pairs` takes rows as TRL's collator makes them, with any entries that a processor adds. Entries with one value
per token are gathered from the rows; entries of images are taken once per pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import IGNORE_INDEX
from ..trees import TokenTree
from .shared_prefix import TreeBatch, image_entry, rope_index

__all__ = ["PairsDiffer", "tree_of_pairs"]


class PairsDiffer(Exception):
    """The rows of a batch have images and cannot share them; the message says why."""


def tree_of_pairs(model: nn.Module, inputs: Mapping[str, Any], completion_mask: Tensor) -> TreeBatch:
    """Token trees of P pairs, each of which is two rows.

    Args:
        model: runs the batch; it determines the positions
        inputs: its inputs for 2P rows, the chosen ones first: input_ids and attention_mask [2P, T], other entries of
            tokens [2P, T], and entries of images: those of the chosen rows, then the same again for the rejected ones
        completion_mask: [2P, T], 1 where a token of an answer is a label

    The rows of a pair share their common start, at most up to the first label. If already their first tokens differ
    (for example after truncation at the start), each row becomes a tree of its own. The batch has 2P answers, one for
    each row; that of a row without labels is empty.

    Raises `PairsDiffer` if there are images, and the rows of a pair have different prompts or images.
    """
    ids = inputs["input_ids"]
    of_tokens = {key: value for key, value in inputs.items() if _shape(value) == ids.shape}
    of_images = {key: value for key, value in inputs.items() if key not in of_tokens}
    layout = _Layout.of({key: value.cpu() for key, value in of_tokens.items()}, completion_mask.cpu(), bool(of_images))
    index = torch.cat(layout.axis).to(ids.device)
    batch = {key: value.flatten()[index].unsqueeze(0) for key, value in of_tokens.items()}
    batch |= {key: image_entry(key, _of_chosen(key, value), inputs) for key, value in of_images.items()}
    tree = TokenTree(tuple(layout.lengths), tuple(layout.parents))
    if "position_ids" not in batch:
        of_rows = rope_index(model, inputs)
        positions = tree.positions(ids.device).unsqueeze(0)
        batch["position_ids"] = positions if of_rows is None else of_rows[0].flatten(1)[:, index].unsqueeze(1)
    answers = [torch.cat([torch.empty(0, dtype=torch.long), *parts]) for parts in (
        [tree.predicting(layout.segments[row]) for row in sorted(layout.segments)],
        [layout.answers[row] for row in sorted(layout.segments)],
    )]  # fmt: skip
    states, tokens = (each.to(ids.device) for each in answers)
    labels = ids.masked_fill(completion_mask == 0, IGNORE_INDEX).flatten()[tokens]
    counts = [len(layout.answers[row]) if row in layout.segments else 0 for row in range(len(ids))]
    return TreeBatch(batch, tree, states, labels, torch.tensor([0, *counts]).cumsum(0).to(ids.device))


@dataclass
class _Layout:
    """The segments of a tree, in the order of the token axis, as indices into the flattened [2P, T] rows.

    `axis`: the tokens of each segment. `answers`: by row, the tokens after its root. `segments`: by row, the segment of
    its answer, which leaves the answer's last token out; rows with an empty answer have none.
    """

    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    axis: list[Tensor] = field(default_factory=list)
    answers: dict[int, Tensor] = field(default_factory=dict)
    segments: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, of_tokens: Mapping[str, Tensor], completion_mask: Tensor, has_images: bool) -> _Layout:
        layout, width = cls(), completion_mask.shape[1]
        kept = [row.nonzero().flatten() for row in of_tokens["attention_mask"]]
        tokens = [row * width + columns for row, columns in enumerate(kept)]
        prompts = [_prompt_length(labeled[columns]) for labeled, columns in zip(completion_mask, kept, strict=True)]
        pairs = len(tokens) // 2
        for chosen, rejected in zip(range(pairs), range(pairs, 2 * pairs), strict=True):
            shared = min(prompts[chosen], prompts[rejected])
            first, second = tokens[chosen][:shared], tokens[rejected][:shared]
            equal = [value.flatten()[first] == value.flatten()[second] for value in of_tokens.values()]
            shared = int(torch.stack(equal).all(0).cumprod(0).sum())
            if has_images and not shared == prompts[chosen] == prompts[rejected]:
                raise PairsDiffer(f"the rows of pair {chosen} have images and different prompts")
            if shared:
                layout._add(shared, {chosen: tokens[chosen], rejected: tokens[rejected]})
            else:
                layout._add(max(prompts[chosen], 1), {chosen: tokens[chosen]})
                layout._add(max(prompts[rejected], 1), {rejected: tokens[rejected]})
        return layout

    def _add(self, prompt: int, rows: Mapping[int, Tensor]) -> None:
        """A root of the first `prompt` tokens of all `rows`, and a branch for what each row has after them."""
        root = self._append(next(iter(rows.values()))[:prompt], -1)
        for row, tokens in rows.items():
            if len(tokens) > prompt:
                self.answers[row] = tokens[prompt:]
                self.segments[row] = self._append(tokens[prompt:-1], root)

    def _append(self, tokens: Tensor, parent: int) -> int:
        self.lengths.append(len(tokens))
        self.parents.append(parent)
        self.axis.append(tokens)
        return len(self.lengths) - 1


def _prompt_length(labeled: Tensor) -> int:
    """The number of tokens before the first label."""
    positions = labeled.nonzero()
    return int(positions[0]) if len(positions) else len(labeled)


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _of_chosen(key: str, value: Any) -> Tensor:
    """The first half of an entry, if the second one is equal."""
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) % 2:
        raise PairsDiffer(f"{key} is not a tensor with the same entries for chosen and rejected rows")
    chosen, rejected = value.chunk(2)
    if not torch.equal(chosen, rejected):
        raise PairsDiffer(f"the rows of a pair have different {key}")
    return chosen
