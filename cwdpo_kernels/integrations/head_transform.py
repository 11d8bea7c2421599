"""What a model does to its logits after its head: measured, since configurations lie.

The backbone is replaced by one that returns a given hidden state, and the head by one that returns given logits
z; what the model's forward makes of them is then f(z) itself, in float32 whatever the weights are, and neither
weights nor data are touched. f must be softcap(scale * z), softcap(x) = cap * tanh(x / cap).
(Cohere2Vision's configuration has a logit_scale that its forward does not apply; Gemma3's conditional-generation
class applies no soft cap although its causal class does.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TINY, _HUGE = 1e-4, 1e7  # logits at which no cap shows, and at which every cap is all that shows
_TOLERANCE = 1e-5  # relative, of a float32 computation


@dataclass(frozen=True)
class Transform:
    """logits = softcap(scale * z) for z = hidden W^T + b; `softcap` None: no cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __str__(self) -> str:
        cap = "no soft cap" if self.softcap is None else f"soft cap {self.softcap:.6g}"
        return f"scale {self.scale:.6g}, {cap}"


def measure_transform(model: nn.Module, head: nn.Module) -> Transform:
    """The transform of a model over a `base_model`, with the output head `head`.

    A factor between backbone and head counts as scale where the head has no bias. Raises ValueError where no
    transform of this form fits: masked columns, an added term, another function, other hidden states.
    """
    vocab, bias = _shape(head)
    z = _probe_logits(vocab)
    received: list[Tensor] = []

    def fake_head(hidden: Tensor) -> Tensor:
        received.append(hidden)
        return z.to(hidden.device).expand(*hidden.shape[:-1], vocab).clone()  # some models scale in place

    with stubbed(model) as (hidden, inputs), _replaced(head, fake_head), torch.no_grad():
        logits = model(**inputs).logits
    if logits.shape[-1] != vocab:
        raise ValueError(f"expected its logits to have {vocab} columns (as its head), got {logits.shape[-1]}")
    before = _factor(received, hidden, bias)
    fitted = _fit(z.double(), logits[0, -1].detach().double().cpu())
    return Transform(fitted.scale * before, fitted.softcap)


def _shape(head: nn.Module) -> tuple[int, bool]:
    layer = head
    while not hasattr(layer, "out_features") and hasattr(layer, "original_module"):
        layer = layer.original_module  # peft's copy of a module that is trained as a whole
    return layer.out_features, getattr(getattr(layer, "base_layer", layer), "bias", None) is not None


def _probe_logits(vocab: int) -> Tensor:
    """Both signs, all magnitudes, in an order that a mask of columns cannot follow; its own random numbers."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.linspace(-4, 7, vocab, dtype=torch.float64)[torch.randperm(vocab, generator=generator)]
    signs = torch.randint(0, 2, (vocab,), generator=generator) * 2 - 1
    z = signs * 10.0**exponents
    z[0], z[-1] = _TINY, _HUGE
    return z.float()


def _factor(received: list[Tensor], hidden: Tensor, bias: bool) -> float:
    """By what the hidden states were multiplied on their way from the backbone to the head."""
    if len(received) != 1 or received[0].shape[-1] != hidden.shape[-1]:
        raise ValueError(f"expected one call of its head with the hidden states of its backbone, got {len(received)}")
    ratio = received[0][0, -1].double() / hidden[0, -1].double()
    factor = ratio.median().item()
    rounding = 4 * torch.finfo(hidden.dtype).eps
    if not bool(((ratio - factor).abs() <= rounding * abs(factor)).all()):
        raise ValueError("expected its head to get the hidden states of its backbone, got others")
    if bias and factor != 1:
        raise ValueError(f"expected a head with a bias to get hidden states as they are, got them times {factor:.6g}")
    return factor


def _fit(z: Tensor, logits: Tensor) -> Transform:
    tiny, huge = z.abs().argmin(), z.abs().argmax()
    scale = (logits[tiny] / z[tiny]).item()
    linear = scale * z[huge].item()
    top = logits[huge].item()
    capped = abs(top - linear) > _TOLERANCE * abs(linear)
    cap = abs(top) if capped else None
    # The scale was read where a cap takes (scale * tiny / cap)^2 / 3 of it, far below float32's rounding.
    expected = scale * z if cap is None else cap * torch.tanh(scale * z / cap)
    fits = (logits - expected).abs() <= _TOLERANCE * expected.abs() + 1e-9
    if not (scale > 0 and cap != 0 and bool(fits.all())):
        share = 1 - fits.double().mean().item()
        raise ValueError(
            "expected its logits to be softcap(scale * z) of its head's output z, got another function "
            f"({share:.1%} of the vocabulary differs from scale {scale:.4g}, cap {cap})"
        )
    return Transform(_rounded(scale), None if cap is None else _rounded(cap))


def _rounded(value: float) -> float:
    """Without the last digits, which are float32's rounding: 0.0625, not 0.06250000001."""
    return float(f"{value:.6g}") if abs(float(f"{value:.6g}") - value) <= 1e-7 * abs(value) else value


class _Output:
    """What a backbone returns, to every model: its hidden states, and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def stubbed(model: nn.Module, tokens: int = 4) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """`model` with a backbone that returns random hidden states [1, tokens, D], which are given, with the inputs
    to call the model with."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    dim = _hidden_size(model)
    hidden = torch.randn(1, tokens, dim, generator=generator).to(embedding.device, embedding.dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=embedding.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with _replaced(model.base_model, lambda *args, **kwargs: _Output(hidden)):
        yield hidden, inputs


def _hidden_size(model: nn.Module) -> int:
    layer = model.get_output_embeddings()
    while not hasattr(layer, "in_features"):
        layer = layer.original_module
    return layer.in_features


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
