"""The kernel `varlen` on a CPU, with a stand-in for torch's variable-length flash attention: what it is given."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cwdpo_kernels.trees import TokenTree, varlen

sys.path.append(str(Path(__file__).parent))
from dense_truth import TREES, inputs, truth, visible


def bottom_right(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.11 in plain torch: [T, H, D], sequence by sequence. The last
    query is at the last key. Query i sees the keys i - left .. i + right, and with -1 all on that side."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_k[-1] == len(key) == len(value)
    assert query.shape[1] == key.shape[1]
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    left, right = window_size
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q), pairwise(cu_seq_k), strict=True):
        own, keys, values = query[q0:q1], key[k0:k1], value[k0:k1]
        place = torch.arange(len(own)) + len(keys) - len(own)
        distance = place[:, None] - torch.arange(len(keys))
        hidden = (distance < -right if right >= 0 else distance.new_zeros(()).bool()) | (
            distance > left if left >= 0 else distance.new_zeros(()).bool()
        )
        score = torch.einsum("qhd,khd->hqk", own, keys) * scale
        outs.append(torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outs)


def with_groups(query, key, value, *args, enable_gqa=False, **options):
    """The one of torch 2.13."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    return bottom_right(query, key, value, *args, **options)


@pytest.mark.parametrize("stand_in", [bottom_right, with_groups])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 1000])
@pytest.mark.parametrize("name", [name for name in TREES if name != "long"])
def test_equals_a_dense_mask(monkeypatch, name, window, stand_in):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    tree = TREES[name]
    *leaves, grad = inputs(tree, batch=2, dtype=torch.float64)
    out = varlen.varlen_attention(*leaves, tree, 0.5, window)
    expected = truth(*leaves, visible(tree, window), 0.5, None)
    found, right = (torch.autograd.grad(each, leaves, grad) for each in (out, expected))
    for ours, theirs in zip((out, *found), (expected, *right), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_window_gathers_only_what_is_seen():
    plan = varlen.plan_of(TokenTree.of_answers([100], [[5, 30]]), 10, 1, torch.device("cpu"))
    assert plan.keys == ((0, 0, 100), (0, 91, 9), (1, 0, 5), (0, 91, 9), (2, 0, 30))
    assert plan.key_bounds.tolist() == [0, 100, 114, 153]
    assert plan.query_bounds.tolist() == [0, 100, 105, 135]


def test_what_it_cannot_compute(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    query = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16)
    assert varlen.why_not_varlen(query, masked=False) is None
    assert varlen.why_not_varlen(query, masked=True) == "has no masks"
    assert varlen.why_not_varlen(query.float(), masked=False) == "needs bfloat16 or float16, got torch.float32"
    for width in (20, 320):
        reason = varlen.why_not_varlen(query.new_zeros(1, 2, 4, width), masked=False)
        assert reason == f"needs a width that is a multiple of 8 and at most 256, got {width}"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert varlen.why_not_varlen(query, masked=False) == "needs a GPU of compute capability 8.0 or newer"
