"""Attention over a token tree with torch's variable-length flash attention (CUDA, bfloat16 and float16).

Each segment is one sequence. Its keys are those of its whole path, gathered. The causal mask is aligned at the last
key, so the segment's tokens see all keys of its ancestors. A gathered path is contiguous, so the distance between two
indices is the distance between their positions, and a window can be counted in either.
"""

from __future__ import annotations

import functools
import inspect
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import TokenTree

OLDEST_GPU = (8, 0)  # the lowest compute capability that flash attention supports
WIDEST, STEP = 256, 8  # of the heads' widths


class Plan(NamedTuple):
    """The S sequences of a call. `keys`: the parts of segments to gather, each as (segment, first token, tokens).
    `query_bounds`, `key_bounds`: cumulative lengths [S + 1], int32. `longest_query`, `longest_key`: in tokens."""

    keys: tuple[tuple[int, int, int], ...]
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int


def why_not_varlen(query: Tensor, masked: bool) -> str | None:
    """Why the kernel does not support this query, which is on a GPU. None if it does."""
    width = query.shape[-1]
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {query.dtype}"
    if width % STEP or width > WIDEST:
        return f"needs a width that is a multiple of {STEP} and at most {WIDEST}, got {width}"
    if masked:
        return "has no masks"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < OLDEST_GPU:
        return f"needs a GPU of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or newer"
    return None


@functools.lru_cache(maxsize=16)
def plan_of(tree: TokenTree, window: int | None, batch: int, device: torch.device) -> Plan:
    """The keys of each segment: its path, and with a `window` only the part of it that its tokens can see. `batch`
    copies of the tree follow each other."""
    keys: list[tuple[int, int, int]] = []
    query_lengths, key_lengths = [], []
    for segment, length in enumerate(tree.lengths):
        if not length:
            continue
        oldest = 0 if window is None else max(0, tree.prefix_lengths[segment] - window + 1)  # position on the path
        for each in tree.path(segment):
            first = max(0, oldest - tree.prefix_lengths[each])
            if first < tree.lengths[each]:
                keys.append((each, first, tree.lengths[each] - first))
        query_lengths.append(length)
        key_lengths.append(tree.prefix_lengths[segment] + length - oldest)
    query_bounds, key_bounds = (
        torch.tensor([0, *accumulate(lengths * batch)], dtype=torch.int32, device=device)
        for lengths in (query_lengths, key_lengths)
    )
    return Plan(tuple(keys), query_bounds, key_bounds, max(query_lengths), max(key_lengths))


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TokenTree, scale: float, window: int | None
) -> Tensor:
    """`tree_attention` without masks and soft cap: query [B, H, T, D], key and value [B, G, T, D], out [B, H, T, D]."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, _ = query.shape
    plan = plan_of(tree, window, batch, query.device)
    key, value = (_gathered(each, tree, plan) for each in (key, value))
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if key.shape[1] != heads:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # since torch 2.12
            options["enable_gqa"] = True
        else:
            key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    out: Any = varlen_attn(
        query.transpose(1, 2).flatten(0, 1), key, value, plan.query_bounds, plan.key_bounds,
        plan.longest_query, plan.longest_key, **options,
    )  # fmt: skip
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)


def _gathered(tensor: Tensor, tree: TokenTree, plan: Plan) -> Tensor:
    """The plan's K keys (or values) of each batch entry, from [B, G, T, D] to [B K, G, D]. Made of slices, because the
    gradient of indexing is not deterministic on a GPU."""
    segments = tensor.split(tree.lengths, dim=2)
    parts = [segments[segment].narrow(2, first, count) for segment, first, count in plan.keys]
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1)
