"""Measures what a model does to its logits after the head, because configs can be wrong.

A stub replaces the backbone and returns a given hidden state; another replaces the head and returns given logits z.
The model's forward then returns f(z), in float32 for any dtype of the weights. f must be softcap(scale * z) with
softcap(x) = cap * tanh(x / cap).

Two examples of wrong configs: Cohere2Vision's has a logit_scale that its forward does not apply. Gemma3's
conditional-generation class applies no soft cap, although its causal class does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .module_types import LanguageModel, SizedLayer, is_sized

_TINY, _HUGE = 1e-4, 1e7  # a logit too small for any cap to matter, and one that any cap saturates
_TOLERANCE = 1e-5  # relative; the computation is in float32


@dataclass(frozen=True)
class Transform:
    """logits = softcap(scale * z) for z = hidden W^T + b; no cap if `softcap` is None."""

    scale: float = 1.0
    softcap: float | None = None

    def __str__(self) -> str:
        cap = "no soft cap" if self.softcap is None else f"soft cap {self.softcap:.6g}"
        return f"scale {self.scale:.6g}, {cap}"


def measure_transform(model: LanguageModel, head: nn.Module) -> Transform:
    """The transform of a model with a `base_model` and the output head `head`.

    A factor on the hidden states between backbone and head is counted as scale; this requires a head without bias.
    Raises ValueError if no transform of this form fits: masked columns, an added term, another function, or a head that
    gets other hidden states.
    """
    layer = _sized(head)
    vocab, bias = layer.out_features, getattr(getattr(layer, "base_layer", layer), "bias", None) is not None
    z = _probe_logits(vocab)
    received: list[Tensor] = []

    def fake_head(hidden: Tensor) -> Tensor:
        received.append(hidden)
        return z.to(hidden.device).expand(*hidden.shape[:-1], vocab).clone()  # some models scale in place

    with stubbed(model, head) as (hidden, inputs), _replaced(head, fake_head), torch.no_grad():
        logits = model(**inputs).logits
    if logits.shape[-1] != vocab:
        raise ValueError(f"expected its logits to have {vocab} columns (as its head), got {logits.shape[-1]}")
    before = _factor(received, hidden, bias)
    fitted = _fit(z.double(), logits[0, -1].detach().double().cpu())
    return Transform(fitted.scale * before, fitted.softcap)


def _sized(head: nn.Module) -> SizedLayer:
    """`head`, or the original layer inside if peft's wrapper of a fully trained module hides the sizes."""
    layer = head
    while not is_sized(layer):
        layer = layer.get_submodule("original_module")
    return layer


def _probe_logits(vocab: int) -> Tensor:
    """Logits of both signs and all magnitudes, shuffled, so that masked or shifted columns are noticed.

    The generator is local: the global random state does not change. The device is always the CPU, not torch's default.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(vocab, generator=generator, device="cpu")
    exponents = torch.linspace(-4, 7, vocab, dtype=torch.float64, device="cpu")[order]
    signs = torch.randint(0, 2, (vocab,), generator=generator, device="cpu") * 2 - 1
    z = signs * 10.0**exponents
    z[0], z[-1] = _TINY, _HUGE
    return z.float()


def _factor(received: list[Tensor], hidden: Tensor, bias: bool) -> float:
    """The factor by which the model multiplied the hidden states between backbone and head."""
    if len(received) != 1:
        raise ValueError(f"expected one call of its head, got {len(received)}")
    if received[0].shape[-1] != hidden.shape[-1]:
        size, got = hidden.shape[-1], received[0].shape[-1]
        raise ValueError(f"expected its head to get its backbone's hidden states of size {size}, got size {got}")
    ratio = received[0][0, -1].double() / hidden[0, -1].double()
    factor = ratio.median().item()
    rounding = 4 * torch.finfo(hidden.dtype).eps
    if not bool(((ratio - factor).abs() <= rounding * abs(factor)).all()):
        raise ValueError("expected its head to get its backbone's hidden states, got different ones")
    if bias and factor != 1:
        raise ValueError(f"expected a head with bias to get unscaled hidden states, got a factor of {factor:.6g}")
    return factor


def _fit(z: Tensor, logits: Tensor) -> Transform:
    tiny, huge = z.abs().argmin(), z.abs().argmax()
    scale = (logits[tiny] / z[tiny]).item()
    linear = scale * z[huge].item()
    top = logits[huge].item()
    capped = abs(top - linear) > _TOLERANCE * abs(linear)
    cap = abs(top) if capped else None
    # At `tiny`, a cap changes the logit by a relative (scale * tiny / cap)^2 / 3, far below float32's rounding.
    expected = scale * z if cap is None else cap * torch.tanh(scale * z / cap)
    fits = (logits - expected).abs() <= _TOLERANCE * expected.abs() + 1e-9
    if not (scale > 0 and cap != 0 and bool(fits.all())):
        share = 1 - fits.double().mean().item()
        raise ValueError(
            "expected its logits to be softcap(scale * z) of its head's output z, got a different function "
            f"({share:.1%} of the vocabulary differs from scale {scale:.4g}, cap {cap})"
        )
    return Transform(_rounded(scale), None if cap is None else _rounded(cap))


def _rounded(value: float) -> float:
    """Drop the digits that are only float32's rounding: 0.0625 instead of 0.06250000001."""
    return float(f"{value:.6g}") if abs(float(f"{value:.6g}") - value) <= 1e-7 * abs(value) else value


class _Output:
    """The stub's output. Its only content is the hidden states; every other attribute is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextlib.contextmanager
def stubbed(model: LanguageModel, head: nn.Module, tokens: int = 4) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Replace the backbone below `head` by a stub; yield the stub's hidden states and the inputs to call `model` with.

    The hidden states are random, [1, tokens, D]. On exit the backbone is restored.
    """
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator("cpu").manual_seed(1)
    dim = _sized(head).in_features
    hidden = torch.randn(1, tokens, dim, generator=generator, device="cpu").to(embedding.device, embedding.dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=embedding.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with _replaced(model.base_model, lambda *args, **kwargs: _Output(hidden)):
        yield hidden, inputs


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
