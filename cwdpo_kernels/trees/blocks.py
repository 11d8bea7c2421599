"""Splits the attention over a token tree into rectangles of queries x keys.

Without a window, every segment has one causal square. A segment with descendants also has one dense rectangle: all
queries of its descendants, which are contiguous, against its keys. The results of a query's rectangles are merged by
their log-sum-exp. So no mask is needed, and no keys are copied.

With a window of w tokens, the query at position i of a path sees the keys at positions i - w + 1 .. i. The queries of a
segment are split into blocks of n. Each block has one rectangle with a mask: its own keys and the w - 1 before them, so
n + w - 1 keys, however long the path is. n is w, limited to 128 .. 512 so that masks stay small. Blocks with equally
many keys before them share a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import TokenTree

SMALLEST_WINDOW_BLOCK, LARGEST_WINDOW_BLOCK = 128, 512  # queries


class Block(NamedTuple):
    """One rectangle. `queries`, `keys`: spans of the token axis. `causal`: query i sees keys 0 .. i (queries and keys
    are one span). `mask` [queries, keys]: added to the scores, 0 or -inf; None is no mask. `merges`: an earlier
    rectangle has other keys of these queries, so the two results are merged."""

    queries: slice
    keys: tuple[slice, ...]
    causal: bool = False
    mask: Tensor | None = None
    merges: bool = False


def blocks_of(
    tree: TokenTree, window: int | None, masks: Mapping[int, Tensor], dtype: torch.dtype, device: torch.device
) -> list[Block]:
    """The rectangles of `tree`. Each query is first in one that does not merge, then in any number that do.

    `masks`: for some roots of n tokens, by index, a mask [n, n] that is added to the scores in place of the causal one.
    Models whose image tokens attend to later image tokens need it.
    """
    if window is not None and window >= max(map(sum, zip(tree.prefix_lengths, tree.lengths, strict=True))):
        window = None
    blocks = _dense_blocks(tree) if window is None else _windowed_blocks(tree, window, dtype, device)
    if not masks:
        return list(blocks)
    own = [Block(tree.span(root), (tree.span(root),), mask=mask.to(dtype)) for root, mask in masks.items()]
    replaced = [range(block.queries.start, block.queries.stop) for block in own]
    return own + [block for block in blocks if not any(block.queries.start in span for span in replaced)]


@functools.lru_cache(maxsize=16)
def _dense_blocks(tree: TokenTree) -> tuple[Block, ...]:
    segments = [index for index, length in enumerate(tree.lengths) if length]
    squares = [Block(tree.span(each), (tree.span(each),), causal=True) for each in segments]
    below = [
        Block(slice(tree.span(each).stop, tree.subtree_ends[each]), (tree.span(each),), merges=True)
        for each in segments
        if tree.subtree_ends[each] > tree.span(each).stop
    ]
    return (*squares, *below)


@functools.lru_cache(maxsize=4)  # entries hold masks; the layers of a model need one or two at a time
def _windowed_blocks(tree: TokenTree, window: int, dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    size = min(max(window, SMALLEST_WINDOW_BLOCK), LARGEST_WINDOW_BLOCK)

    @functools.cache
    def mask(count: int, before: int) -> Tensor:
        """[count, before + count], for queries with `before` visible keys in front of them."""
        distance = torch.arange(before, before + count)[:, None] - torch.arange(before + count)
        hidden = (distance < 0) | (distance >= window)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf).to(device)

    def block(segment: int, first: int, count: int) -> Block:
        """The rectangle of `count` queries of a segment, from its token `first` on."""
        start = tree.prefix_lengths[segment] + first  # position on the path
        before = min(start, window - 1)
        queries = slice(tree.starts[segment] + first, tree.starts[segment] + first + count)
        return Block(queries, _part_of_path(tree, segment, start - before, start + count), mask=mask(count, before))

    return tuple(
        block(segment, first, min(size, length - first))
        for segment, length in enumerate(tree.lengths)
        for first in range(0, length, size)
    )


def _part_of_path(tree: TokenTree, segment: int, start: int, stop: int) -> tuple[slice, ...]:
    """The spans of the token axis that hold the positions `start` .. `stop` - 1 of a segment's path."""
    spans = []
    for each in tree.path(segment):
        low = max(start, tree.prefix_lengths[each])
        high = min(stop, tree.prefix_lengths[each] + tree.lengths[each])
        if low < high:
            offset = tree.starts[each] - tree.prefix_lengths[each]
            spans.append(slice(low + offset, high + offset))
    return tuple(spans)
