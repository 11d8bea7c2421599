"""Attention over a token tree with torch's variable-length flash attention (CUDA, bfloat16 and float16).

Each segment is a sequence whose keys are those of its path, gathered. Its causal mask is aligned at the last key, so
the segment's tokens see all keys before it. A path is contiguous, so a window by index is one by position.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import TokenTree


class Gather(NamedTuple):
    """`keys` [K]: the indices of all segments' keys. Cumulative lengths of queries and keys, int32, and the longest."""

    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int


@functools.lru_cache(maxsize=16)
def gather_of(tree: TokenTree, window: int | None, device: torch.device) -> Gather:
    """The keys of each segment: its path, and with a `window` only the part of it that its tokens can see."""
    segments = [index for index, length in enumerate(tree.lengths) if length]
    paths = []
    for each in segments:
        path = torch.cat([torch.arange(*tree.span(above).indices(tree.tokens)) for above in tree.path(each)])
        oldest = 0 if window is None else max(0, tree.depths[each] - window + 1)
        paths.append(path[oldest:])
    queries, keys = [tree.lengths[each] for each in segments], [len(path) for path in paths]
    cu_queries, cu_keys = (torch.tensor([0, *each]).cumsum(0).to(device, torch.int32) for each in (queries, keys))
    return Gather(torch.cat(paths).to(device), cu_queries, cu_keys, max(queries), max(keys))


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TokenTree, scale: float, window: int | None
) -> Tensor:
    """See `tree_attention`. B must be 1."""
    from torch.nn.attention.varlen import varlen_attn

    gather = gather_of(tree, window, query.device)
    heads = query.shape[1]
    rows = query[0].transpose(0, 1)
    key, value = (_repeated(each[0].index_select(1, gather.keys), heads).transpose(0, 1) for each in (key, value))
    out: Any = varlen_attn(
        rows, key, value, gather.cu_queries, gather.cu_keys, gather.longest_query, gather.longest_key,
        scale=scale, window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    return out.transpose(0, 1).unsqueeze(0)


def _repeated(heads: Tensor, count: int) -> Tensor:
    return heads if heads.shape[0] == count else heads.repeat_interleave(count // heads.shape[0], dim=0)
