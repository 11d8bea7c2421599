"""The layout of a token axis on which several answers share one copy of their prompt."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..validation import expect

ROOT = -1


@dataclass(frozen=True)
class TokenTree:
    """Segments of tokens on one axis of T tokens, such as prompt | chosen | rejected | next prompt | ...

        lengths   tokens of each segment, in the order of the axis; roots have at least 1
        parents   index of the segment that each one continues; -1 for a root

    A token sees itself, the tokens before it in its segment, and all tokens of the segment's ancestors. Segments are in
    depth-first order: all descendants of a segment directly follow it. Raises `ValueError` if they are not, or if
    lengths and parents are not ints in their ranges.

    Example: a prompt of 5 tokens with answers of 2 and 3, then one of 4 with answers of 1 and 2, is
    `TokenTree((5, 2, 3, 4, 1, 2), (-1, 0, 0, -1, 3, 3))`, or `TokenTree.of_answers([5, 4], [[2, 3], [1, 2]])`.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("lengths", "parents"):
            numbers = tuple(getattr(self, name))
            is_int = all(hasattr(number, "__index__") for number in numbers)
            expect(is_int, "TokenTree", name, "values", "ints", numbers)
            object.__setattr__(self, name, tuple(map(operator.index, numbers)))  # of lists and tensors, too
        count = len(self.lengths)
        expect(count > 0, "TokenTree", "lengths", "segments", ">= 1", count)
        expect(
            len(self.parents) == count, "TokenTree", "parents", "segments", f"{count} (as lengths)", len(self.parents)
        )
        open_path: list[int] = []
        for index, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            smallest = 1 if parent == ROOT else 0
            expect(length >= smallest, "TokenTree", f"lengths[{index}]", "value", f">= {smallest}", length)
            while open_path and open_path[-1] != parent:
                open_path.pop()
            is_in_order = parent == ROOT or bool(open_path)
            expected = "-1, the segment before, or one of its ancestors (depth-first order)"
            expect(is_in_order, "TokenTree", f"parents[{index}]", "value", expected, parent)
            open_path.append(index)

    @classmethod
    def of_answers(cls, prompts: Sequence[int], answers: Sequence[Sequence[int]]) -> TokenTree:
        """Prompts of the given lengths, each followed by answers of the given lengths."""
        expect(len(answers) == len(prompts), "of_answers", "answers", "prompts", len(prompts), len(answers))
        lengths: list[int] = []
        parents: list[int] = []
        for prompt, of_prompt in zip(prompts, answers, strict=True):
            parents += [ROOT, *[len(lengths)] * len(of_prompt)]
            lengths += [prompt, *of_prompt]
        return cls(tuple(lengths), tuple(parents))

    @property
    def tokens(self) -> int:
        """The length T of the token axis."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each segment starts on the token axis."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def subtree_ends(self) -> tuple[int, ...]:
        """Where the last descendant of each segment ends on the token axis, or the segment itself if it has none."""
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        for index in reversed(range(len(ends))):
            parent = self.parents[index]
            if parent != ROOT:
                ends[parent] = max(ends[parent], ends[index])
        return tuple(ends)

    @cached_property
    def prefix_lengths(self) -> tuple[int, ...]:
        """The number of tokens before each segment on its path: the position of its first token."""
        before: list[int] = []
        for parent in self.parents:
            before.append(0 if parent == ROOT else before[parent] + self.lengths[parent])
        return tuple(before)

    def path(self, segment: int) -> tuple[int, ...]:
        """The segments from the root to `segment`, including both."""
        path = [segment]
        while self.parents[path[-1]] != ROOT:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    def span(self, segment: int) -> slice:
        """The segment's place on the token axis."""
        return slice(self.starts[segment], self.starts[segment] + self.lengths[segment])

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """The position [T] of each token on its path, int64. Siblings start at the same position."""
        pairs = zip(self.prefix_lengths, self.lengths, strict=True)
        spans = [torch.arange(first, first + length) for first, length in pairs]
        return torch.cat(spans).to(device)

    def predicting(self, segment: int) -> Tensor:
        """The indices [n + 1], int64, of the tokens whose hidden states predict the n tokens of `segment` and the one
        after it: the last token before the segment on its path, then its own tokens. A root has only its own [n].

        So an answer of L labels needs a segment of L - 1 tokens. The prompt's last hidden state predicts the first
        token of every answer.
        """
        own = torch.arange(*self.span(segment).indices(self.tokens))
        before = [each for each in self.path(segment)[:-1] if self.lengths[each]]
        return own if not before else torch.cat([torch.tensor([self.span(before[-1]).stop - 1]), own])
