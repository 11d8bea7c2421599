"""Attention over token trees against float64 attention with a dense mask of the tree."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from dense_truth import TREES, compare, visible


@pytest.mark.parametrize("kernel", ["flash_cpu", "math"])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 1000])
@pytest.mark.parametrize("name", TREES)
def test_equals_a_dense_mask(name, window, kernel):
    compare(TREES[name], window=window, kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    compare(TREES["pairs"], tolerance=4 * torch.finfo(dtype).eps, dtype=dtype)


@pytest.mark.parametrize(
    "shape", [{"heads": 6, "groups": 6}, {"heads": 6, "groups": 1}, {"width": 80, "value_width": 80}]
)
def test_shapes(shape):
    compare(TREES["pairs"], batch=2, **shape)


def test_soft_cap_and_values_of_another_width():
    compare(TREES["deep"], softcap=1.5, value_width=12)
    compare(TREES["deep"], softcap=1.5, window=4)


def test_masks_of_roots():
    tree = TREES["pairs"]
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    mask[2:6, 2:6] = 0  # an image whose tokens see each other
    for window in (None, 4):
        allowed = visible(tree, window)
        allowed[:9, :9] = mask == 0
        compare(tree, window=window, masks={0: mask}, allowed=allowed)
