"""cut-cross-entropy's linear_cross_entropy and ours, called with the same arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cwdpo_kernels.compat.cut_cross_entropy import linear_cross_entropy
from cwdpo_kernels.testing import relative_error


def make(tokens: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(0, 507, tokens, generator=generator)
    targets[..., ::4] = -100
    return [leaf(*tokens, 33), leaf(507, 33), leaf(507)], targets


def eager(e, c, bias, targets, shift: int, softcap: float | None, reduction: str) -> torch.Tensor:
    logits = F.linear(e[..., : e.shape[-2] - shift, :], c, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    targets = targets[..., shift:]
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_values_and_gradients(reduction, shift, softcap, dtype, tolerance):
    leaves, targets = make((3, 11), dtype)
    e, c, bias = leaves
    loss = linear_cross_entropy(e, c, targets, bias, softcap=softcap, reduction=reduction, shift=shift)
    found = torch.autograd.grad(loss.sum(), leaves)
    copies = [x.detach().double().requires_grad_() for x in leaves]
    loss64 = eager(*copies, targets, int(shift), softcap, reduction)
    expected = torch.autograd.grad(loss64.sum(), copies)
    assert loss.shape == loss64.shape
    assert relative_error(loss.detach(), loss64.detach()) < 1e-5
    assert all(relative_error(a, b) < tolerance for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shift", [False, 2])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_log_sum_exp_and_a_z_loss(shift, softcap, dtype, tolerance):
    """return_lse: also the log-sum-exp, whose gradient a z-loss needs."""
    leaves, targets = make((3, 11), dtype)
    e, c, bias = leaves
    loss, lse = linear_cross_entropy(e, c, targets, bias, softcap=softcap, shift=shift, return_lse=True)
    plain = linear_cross_entropy(e, c, targets, bias, softcap=softcap, shift=shift)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    copies = [x.detach().double().requires_grad_() for x in leaves]
    e64, c64, bias64 = copies
    logits = e64[:, : 11 - int(shift)] @ c64.T + bias64
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse64 = logits.logsumexp(-1) * (targets[:, int(shift) :] != -100)
    assert lse.shape == lse64.shape
    assert relative_error(lse.detach(), lse64.detach()) < 1e-6
    loss64 = eager(*copies, targets, int(shift), softcap, "mean")
    found = torch.autograd.grad(loss + 0.1 * lse.square().sum(), leaves)
    expected = torch.autograd.grad(loss64 + 0.1 * lse64.square().sum(), copies)
    assert all(relative_error(a, b) < tolerance for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shift", [False, True])
def test_only_the_import_changes(reduction, shift):
    peer = pytest.importorskip("cut_cross_entropy")
    (e, c, _), targets = make((3, 11), torch.float32)
    options = {"softcap": 5.0, "reduction": reduction, "shift": shift}
    with torch.no_grad():
        theirs = peer.linear_cross_entropy(e, c, targets, impl="torch_compile", **options)
    ours = linear_cross_entropy(e, c, targets, **options)
    torch.testing.assert_close(ours, theirs)
    exact = {"filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": False, "filter_e_grad": False}
    assert torch.equal(linear_cross_entropy(e, c, targets, **exact, **options), ours)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filter_eps": "high"}, NotImplementedError, "filter_eps='high' is not supported"),
        ({"filter_c_grad": True}, NotImplementedError, "filter_c_grad=True is not supported"),
        ({"impl": "cce"}, NotImplementedError, "impl='cce' is not supported"),
        ({"reduction": "avg"}, ValueError, "expected reduction to have a value in none, mean, sum, got 'avg'"),
        ({"shift": -1}, ValueError, r"expected shift to have a value between 0 and 10 \(as targets\), got -1"),
        ({"shift": 11}, ValueError, r"expected shift to have a value between 0 and 10 \(as targets\), got 11"),
        (
            {"bias": -100},
            ValueError,
            r"expected bias to have type Tensor or None \(pass ignore_index by name\)",
        ),
    ],
    ids=["filter", "filter_grad", "impl", "reduction", "negative", "too-far", "positional"],
)
def test_errors_name_the_argument(options, error, message):
    (e, c, _), targets = make((3, 11), torch.float32)
    with pytest.raises(error, match=message):
        linear_cross_entropy(e, c, targets, **options)
