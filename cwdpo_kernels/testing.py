"""Inputs and error budgets shared by tests and benchmarks. Errors are measured against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import IGNORE_INDEX, Head


def make_inputs(
    shape: tuple[int, ...], vocab: int, dim: int, dtype: torch.dtype = torch.float32, *, bias: bool = False,
    scale: float = 1.0, softcap: float | None = None, labelled: float = 0.7, logit_std: float = 3.0, seed: int = 0,
) -> tuple[Tensor, Head, Tensor]:  # fmt: skip
    """Random hidden [*shape, D], a head whose raw logits have standard deviation `logit_std`, and labels.

    A share of `1 - labelled` of the labels is ignored. All floating-point tensors require a gradient. The values are
    drawn on the CPU, the same for every device, and returned on the default device.
    """
    random, device = torch.Generator().manual_seed(seed), torch.get_default_device()

    def leaf(*size: int, std: float) -> Tensor:
        values = torch.randn(*size, generator=random, dtype=torch.float64, device="cpu") * std
        return values.to(dtype).to(device).requires_grad_()

    hidden = leaf(*shape, dim, std=1.0)
    weight = leaf(vocab, dim, std=logit_std / math.sqrt(dim))
    labels = torch.randint(vocab, shape, generator=random, device="cpu")
    labels[torch.rand(shape, generator=random, device="cpu") >= labelled] = IGNORE_INDEX
    return hidden, Head(weight, leaf(vocab, std=1.0) if bias else None, scale, softcap), labels.to(device)


def confident_inputs(
    p_label: float, tokens: int, vocab: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Head, Tensor]:
    """Tokens whose label has probability `p_label` (up to the rounding of the inputs to `dtype`).

    Each hidden state points roughly along its label's row of the head. Bisection finds its length.
    """
    random, device = torch.Generator().manual_seed(seed), torch.get_default_device()

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64, device="cpu").to(device) / math.sqrt(dim)

    weight = normal(vocab, dim).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=random, device="cpu").to(device)
    direction = weight.double()[labels] + 0.3 * normal(tokens, dim)
    logits = direction @ weight.double().T
    low, high = torch.zeros(tokens, 1).double(), torch.full((tokens, 1), 100.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        logp = torch.log_softmax(middle * logits, -1)
        too_low = logp.gather(1, labels[:, None]) < math.log(p_label)
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return (high * direction).to(dtype).requires_grad_(), Head(weight.requires_grad_()), labels


def as_float64(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """The same, already rounded, values as float64 leaves."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    bias = None if head.bias is None else leaf(head.bias)
    return leaf(hidden), Head(leaf(head.weight), bias, head.scale, head.softcap)


def leaves(hidden: Tensor, head: Head) -> list[Tensor]:
    """Those of hidden, weight and bias that exist and require a gradient."""
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in the 2-norm, in float64; inf if `actual` is not finite."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if not torch.isfinite(actual).all():
        return math.inf
    error, size = torch.linalg.vector_norm(actual - truth).item(), torch.linalg.vector_norm(truth).item()
    return error / size if size else (0.0 if error == 0 else math.inf)


def check_budget(name: str, actual: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Raise unless the error is at most twice that of the eager computation in the same dtype, plus rounding.

    Rounding is that of the result's dtype plus that of the float64 truth.
    """
    rounding = 4 * torch.finfo(actual.dtype).eps + 1e-13
    error, allowed = relative_error(actual, truth), 2 * relative_error(eager, truth) + rounding
    if not error <= allowed:
        raise AssertionError(f"{name}: relative error {error:.3g} against float64, allowed {allowed:.3g}")
