"""torch's linear_cross_entropy and ours, called with the same arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cwdpo_kernels.compat.torch_nn import linear_cross_entropy
from cwdpo_kernels.testing import relative_error


def make(tokens: tuple[int, ...], dtype: torch.dtype, *, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    return [leaf(*tokens, 33), leaf(507, 33), *([leaf(507)] if bias else [])], torch.randint(
        0, 507, tokens, generator=generator
    )


def float64_truth(leaves: list[torch.Tensor], target: torch.Tensor, **options) -> list[torch.Tensor]:
    copies = [x.detach().double().requires_grad_() for x in leaves]
    loss = F.cross_entropy(F.linear(*copies), target, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), copies)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [(21,), ()], ids=["batch", "one"])
@pytest.mark.parametrize(
    ("dtype", "smoothing", "tolerance"),
    [
        *((torch.float64, smoothing, 1e-12) for smoothing in (0.0, 0.1, 1.0)),
        *((torch.float32, smoothing, 2e-6) for smoothing in (0.0, 0.1, 1.0)),
        *((torch.bfloat16, smoothing, 8e-3) for smoothing in (0.0, 0.1)),  # not 1.0: see the docstring
    ],
    ids=str,
)
def test_values_and_gradients(reduction, smoothing, bias, tokens, dtype, tolerance):
    leaves, target = make(tokens, dtype, bias=bias)
    if tokens:
        target[::4] = -100
    loss = linear_cross_entropy(
        *leaves[:2],
        target,
        linear_bias=leaves[2] if bias else None,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    found = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
    truth = float64_truth(leaves, target, reduction=reduction, label_smoothing=smoothing)
    assert relative_error(found[0], truth[0]) < 1e-5
    assert all(relative_error(a, b) < tolerance for a, b in zip(found, truth, strict=True))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
@pytest.mark.parametrize("ignore_index", [None, 7])
def test_only_the_import_changes(ignore_index):
    (hidden, weight, bias), target = make((40,), torch.float32, bias=True)
    target[3:9] = -100 if ignore_index is None else ignore_index
    options = {"linear_bias": bias, "ignore_index": ignore_index, "label_smoothing": 0.2}
    theirs = F.linear_cross_entropy(hidden, weight, target, **options)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, **options), theirs)


def test_the_mean_of_no_token_is_nan():
    (hidden, weight), target = make((4,), torch.float32, bias=False)
    assert linear_cross_entropy(hidden, weight, torch.full_like(target, -100)).isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(507)}, NotImplementedError, "weight"),
        ({"options": object()}, NotImplementedError, "options"),
        ({"target": torch.rand(4, 507)}, NotImplementedError, "class probabilities"),
        ({"linear_weight": torch.rand(507, 2, 33)}, NotImplementedError, "more than 2 dimensions"),
        ({"reduction": "avg"}, ValueError, "expected reduction to have a value in none, mean, sum, got 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "expected label_smoothing to have a value between 0 and 1, got 1.5"),
    ],
    ids=["class-weight", "options", "probabilities", "dimensions", "reduction", "smoothing"],
)
def test_errors_name_the_argument(change, error, message):
    (hidden, weight), target = make((4,), torch.float32, bias=False)
    arguments = {"input": hidden, "linear_weight": weight, "target": target} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)
