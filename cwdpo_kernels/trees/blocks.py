"""Which rectangles of (query, key) pairs the attention over a token tree consists of.

Without a window, every segment has one causal square, and every segment with others below it has one dense rectangle:
the queries below it, which are contiguous, against its keys. A query's results of several rectangles are merged by
their log-sum-exp. So no mask is needed, and no keys are copied.

With a window of w tokens, query i of a path sees its keys i - w + 1 .. i. Distances on a path are distances of
positions. The queries are cut into blocks of about w, and each block has one rectangle with a mask: its own keys and
the w - 1 before them, at most 2 w per row, however long the path is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import TokenTree

SMALLEST_WINDOW_BLOCK = 128  # queries


class Block(NamedTuple):
    """One rectangle. `keys`: spans of the token axis. `causal`: query i sees keys 0 .. i (queries and keys are the same
    span). `mask` [queries, keys], added to the scores: 0 or -inf; None is no mask. `merges`: an earlier rectangle has
    other keys of these queries."""

    queries: slice
    keys: tuple[slice, ...]
    causal: bool = False
    mask: Tensor | None = None
    merges: bool = False


def blocks_of(
    tree: TokenTree, window: int | None, masks: dict[int, Tensor], dtype: torch.dtype, device: torch.device
) -> list[Block]:
    """The rectangles of `tree`. Each query is in one that does not merge, and after it in any number that do.

    `masks` has, for some roots, their own mask [n, n] over their tokens, added to the scores, in place of the causal
    one: image tokens of some models see later ones.
    """
    if window is not None and window >= max(map(sum, zip(tree.depths, tree.lengths, strict=True))):
        window = None
    blocks = _dense_blocks(tree) if window is None else _windowed_blocks(tree, window, dtype, device)
    if not masks:
        return list(blocks)
    own = [Block(tree.span(root), (tree.span(root),), mask=mask) for root, mask in masks.items()]
    replaced = [range(block.queries.start, block.queries.stop) for block in own]
    return own + [block for block in blocks if not any(block.queries.start in span for span in replaced)]


@functools.lru_cache(maxsize=16)
def _dense_blocks(tree: TokenTree) -> tuple[Block, ...]:
    segments = [index for index, length in enumerate(tree.lengths) if length]
    squares = [Block(tree.span(each), (tree.span(each),), causal=True) for each in segments]
    below = [
        Block(slice(tree.span(each).stop, tree.ends_below[each]), (tree.span(each),), merges=True)
        for each in segments
        if tree.ends_below[each] > tree.span(each).stop
    ]
    return (*squares, *below)


@functools.lru_cache(maxsize=16)
def _windowed_blocks(tree: TokenTree, window: int, dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    size = max(window, SMALLEST_WINDOW_BLOCK)
    return tuple(
        _windowed_block(tree, segment, first, min(size, length - first), window, dtype, device)
        for segment, length in enumerate(tree.lengths)
        for first in range(0, length, size)
    )


def _windowed_block(
    tree: TokenTree, segment: int, first: int, count: int, window: int, dtype: torch.dtype, device: torch.device
) -> Block:
    """The rectangle of `count` queries of a segment, from its token `first` on."""
    start = tree.depths[segment] + first  # positions on the path
    oldest = max(0, start - window + 1)
    keys = []
    for each in tree.path(segment):
        low = max(oldest, tree.depths[each])
        high = min(start + count, tree.depths[each] + tree.lengths[each])
        if low < high:
            offset = tree.starts[each] - tree.depths[each]
            keys.append(slice(low + offset, high + offset))
    distance = torch.arange(start, start + count)[:, None] - torch.arange(oldest, start + count)
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf).to(device)
    queries = slice(tree.starts[segment] + first, tree.starts[segment] + first + count)
    return Block(queries, tuple(keys), mask=mask)
