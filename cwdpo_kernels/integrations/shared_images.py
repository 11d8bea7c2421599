"""Image features that are computed once for several forwards on the same images: of the policy and its reference.

    features = ImageFeatures(policy, reference)
    with features.once():
        reference(**batch)  # computes the features
        policy(**batch)     # takes them

A model's features may be taken from another one only if both have the same weights below them. `ImageFeatures` takes
them once it has seen that nothing below them trains: the policy's features need no gradient. The reference is a copy
of the policy, so its frozen weights are the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .module_types import unwrapped

__all__ = ["ImageFeatures"]

_METHOD = "get_image_features"  # of transformers' vision-language models, which call it in forward


class ImageFeatures:
    """The image features of the current batch, for `models` with the same architecture and the same frozen weights.

    `is_shared` says whether forwards within `once` share features; it stays False for models without images, models
    whose vision path trains, and models with dropout or batch normalization, which differ from forward to forward.
    """

    def __init__(self, *models: nn.Module) -> None:
        self.is_shared = False
        # Features by the identity of their arguments, with the arguments, whose memory must not be used again.
        self._kept: dict[tuple[object, ...], tuple[Any, Any]] = {}
        bases = [_backbone(model) for model in models]
        if not all(hasattr(base, _METHOD) and not _is_random(base) for base in bases):
            return  # nothing calls `take` then
        for base in bases:
            vars(base)[_METHOD] = MethodType(_sharing(type(base)), base)  # a bound method, so copies call their own

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Forwards within this context compute the features of the same tensors once. They are dropped at its end."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            self._kept.clear()
            _CURRENT.reset(token)

    def take(self, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`compute(*args, **kwargs)`, or its result in an earlier forward if features are shared."""
        key = _key(args, kwargs)
        if key in self._kept:
            return copy.copy(self._kept[key][0])  # a model may take entries out of it
        found = compute(*args, **kwargs)
        if torch.is_grad_enabled():
            self.is_shared = not any(tensor.requires_grad for tensor in _tensors(found))
        if self.is_shared:
            self._kept[key] = copy.copy(found), (args, kwargs)
        return found


_CURRENT: ContextVar[ImageFeatures | None] = ContextVar("image_features", default=None)


def _sharing(kind: type[nn.Module]) -> Callable[..., Any]:
    """The method of `kind` that computes image features, sharing them within `ImageFeatures.once`. It has the plain
    method's signature: `generate` passes only arguments that it finds there."""
    plain: Callable[..., Any] = getattr(kind, _METHOD)

    @functools.wraps(plain)
    def get_image_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compute = MethodType(plain, self)
        current = _CURRENT.get()
        return compute(*args, **kwargs) if current is None else current.take(compute, args, kwargs)

    return get_image_features


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...]:
    """Identify the arguments of a call: tensors by their memory."""
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple(
        (name, value.data_ptr(), value.shape, value.dtype) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in named
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _backbone(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _is_random(base: nn.Module) -> bool:
    """Whether the vision path may give other features to a model in training than to its reference."""
    config: Any = getattr(base, "config", None)
    vision = getattr(config, "vision_config", None)
    rates = [
        getattr(vision, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "dropout", "drop_path_rate")
    ]
    layers = (nn.modules.batchnorm._BatchNorm,)
    below = [module for name, module in base.named_modules() if "language_model" not in name]
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in below)
    return any(rates) or drops or any(isinstance(module, layers) for module in below)
