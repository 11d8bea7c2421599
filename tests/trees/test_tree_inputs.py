"""Inputs of `tree_attention` and `TokenTree` other than the usual ones: strides, frozen tensors, and mistakes."""

import sys
from pathlib import Path

import pytest
import torch

from cwdpo_kernels.trees import TokenTree, blocks, tree_attention

sys.path.append(str(Path(__file__).parent))
from dense_truth import TREES, compare, inputs, truth, visible

TREE = TREES["pair"]


@pytest.mark.parametrize("kernel", ["flash_cpu", "math"])
def test_strides(kernel):
    """Slices with a step, heads in another order in memory, and the gradient of a sum, whose strides are 0."""
    *leaves, _ = inputs(TREE)
    steps = [torch.stack([each, each], -1)[..., 0] for each in leaves]
    transposed = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in leaves]
    expected = tree_attention(*leaves, TREE, kernel="math")
    grads = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    for strided in (steps, transposed):
        out = tree_attention(*strided, TREE, kernel=kernel)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
        for ours, theirs in zip(torch.autograd.grad(out.sum(), leaves), grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=4e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["flash_cpu", "math"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_inputs(frozen, kernel):
    *leaves, grad = inputs(TREE)
    expected = torch.autograd.grad(tree_attention(*leaves, TREE, kernel=kernel), leaves, grad)
    for index in frozen:
        leaves[index].requires_grad_(False)
    tree_attention(*leaves, TREE, kernel=kernel).backward(grad)
    for index, leaf in enumerate(leaves):
        if index in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[index], atol=0, rtol=0)


def test_without_gradients():
    *leaves, _ = inputs(TREE)
    expected = tree_attention(*leaves, TREE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(tree_attention(*leaves, TREE), expected)


def test_second_derivatives_raise():
    """Also those of a sum, whose gradient needs none."""
    *leaves, _ = inputs(TREE)
    (grad,) = torch.autograd.grad(tree_attention(*leaves, TREE).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="tree_attention: second derivatives are not implemented"):
        grad.sum().backward()


def test_other_transforms():
    *leaves, _ = (each.detach() for each in inputs(TREE))

    def total(query):
        return tree_attention(query, *leaves[1:], TREE).sum()

    query = leaves[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(leaves[0]), torch.autograd.grad(total(query), query)[0])
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(total, (leaves[0],), (leaves[0],))


@pytest.mark.filterwarnings("ignore")  # dynamo's own, about what it traces
def test_compiled():
    *leaves, _ = (each.detach() for each in inputs(TREE))
    expected = tree_attention(*leaves, TREE)  # dynamo cannot trace the tree's cached properties before their first use
    torch._dynamo.reset()
    compiled = torch.compile(lambda *tensors: tree_attention(*tensors, TREE), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), expected)


def test_windows_with_several_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "SMALLEST_WINDOW_BLOCK", 3)
    monkeypatch.setattr(blocks, "LARGEST_WINDOW_BLOCK", 5)
    blocks._windowed_blocks.cache_clear()
    for window in (1, 4, 11):
        compare(TokenTree((23, 7, 14, 2), (-1, 0, 0, 2)), window=window)
    blocks._windowed_blocks.cache_clear()


def test_masks_of_windows_are_small():
    """16k tokens with a window of 4096: one mask for all blocks but the first ones, where the window is not full."""
    tree = TokenTree.of_answers([16384], [[700, 700]])
    found = blocks._windowed_blocks(tree, 4096, torch.bfloat16, torch.device("cpu"))
    masks = {id(block.mask): block.mask for block in found}.values()
    assert len(found) == 36
    assert sum(mask.nbytes for mask in masks) < 32 * 2**20
    assert all(sum(span.stop - span.start for span in block.keys) == block.mask.shape[1] for block in found)
    blocks._windowed_blocks.cache_clear()


def test_masks_of_another_dtype():
    *leaves, _ = inputs(TREE, dtype=torch.bfloat16)
    allowed = visible(TREE, None)
    allowed[2:6, 2:6] = True
    mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~allowed[:9, :9], -torch.inf)
    expected = truth(*(each.double() for each in leaves), allowed, 8**-0.5, None)
    for kernel in ("flash_cpu", "math"):
        out = tree_attention(*leaves, TREE, masks={0: mask}, kernel=kernel)
        torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "expected window to have value an int >= 1, or None, got 0"),
        ({"window": 2.5}, "expected window to have value an int >= 1, or None, got 2.5"),
        ({"window": True}, "expected window to have value an int >= 1, or None, got True"),
        ({"softcap": 0.0}, "expected softcap to have value None or between"),
        ({"masks": {0: torch.ones(9, 9).tril().bool()}}, r"expected masks\[0\] to have dtype .*, got torch.bool"),
        ({"masks": {0: torch.zeros(9, 9, device="meta")}}, r"expected masks\[0\] to have device cpu \(as query\)"),
        ({"masks": {1: torch.zeros(3, 3)}}, "expected masks to have keys indices of roots, got 1"),
        ({"masks": {0: torch.zeros(3, 3)}}, r"expected masks\[0\] to have shape \[9, 9\], got \[3, 3\]"),
        ({"kernel": "flash"}, "expected kernel to have"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"tree_attention: {message}"):
        tree_attention(*inputs(TREE)[:3], TREE, **options)


def test_wrong_tensors():
    query, key, value, _ = inputs(TREE)
    for tensors, message in (
        ((query, key[:, :0], value[:, :0]), "expected key to have heads >= 1, got 0"),
        ((query[..., :0], key[..., :0], value), "expected query to have width >= 1, got 0"),
        ((query, key.double(), value), "expected key to have dtype"),
        ((query, key[:, :, 1:], value), r"expected key to have tokens 17 \(as tree\), got 16"),
        ((query[:, :3], key, value), r"expected query to have heads a multiple of 2 \(as key\), got 3"),
    ):
        with pytest.raises(ValueError, match=f"tree_attention: {message}"):
            tree_attention(*tensors, TREE)


def test_layouts():
    tree = TokenTree([9, torch.tensor(3), 5], [-1, 0, 0])  # of lists
    assert tree == TREE
    assert hash(tree) == hash(TREE)
    for lengths, parents, message in (
        ((), (), "expected lengths to have segments >= 1, got 0"),
        ((9.0, 3), (-1, 0), "expected lengths to have values ints"),
        ((9, 3), (-1,), r"expected parents to have segments 2 \(as lengths\), got 1"),
        ((0, 3), (-1, 0), r"expected lengths\[0\] to have value >= 1, got 0"),
        ((9, -1), (-1, 0), r"expected lengths\[1\] to have value >= 0, got -1"),
        ((9, 3, 2), (-1, 0, 2), r"expected parents\[2\] to have value -1, the segment before"),
    ):
        with pytest.raises(ValueError, match=f"TokenTree: {message}"):
            TokenTree(lengths, parents)
    with pytest.raises(ValueError, match="of_answers: expected answers to have prompts 2, got 1"):
        TokenTree.of_answers([5, 3], [[1]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [slice(0, 9), slice(9, 12), slice(2, 3), slice(12, 17)])
def test_nan_stays_visible(keys, bad):
    """Every token that sees a bad key is NaN, even if its segment has no other keys, and no other token is. In the
    gradient, tokens beside it may be NaN as well."""
    tree = TREES["pair"]
    query, key, value, _ = (each.detach().clone() for each in inputs(tree))
    key[:, :, keys] = bad
    out = tree_attention(query.requires_grad_(), key, value, tree)
    expected = visible(tree, None)[:, keys].any(1)
    assert torch.equal(out.isnan().any(-1).any(1)[0], expected)
    out.sum().backward()
    assert query.grad.isnan().any(-1).any(1)[0][expected].all()
