"""Computes image features once for several forwards on the same images, such as those of policy and reference.

    features = ImageFeatures(policy, reference)
    with features.once():
        reference(**batch)  # computes the features
        policy(**batch)     # reuses them

Two models can share features only if the weights that compute them are the same and frozen. `ImageFeatures` checks that
on the first batch that both encode: the policy's features need no gradient, and equal those of the reference. From the
next batch on they are shared.
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
    """Shares the image features of the current batch between forwards of `models`, which have the same architecture.

    `is_shared` says whether forwards within `once` share features. It stays False for models without images, and if the
    vision path trains, has adapters (a reference may turn them off), has other weights in another model, or uses
    dropout or batch normalization (its output changes from forward to forward).
    """

    def __init__(self, *models: nn.Module) -> None:
        self.is_shared = False
        self._differs = False
        # Features by their arguments' addresses. The arguments are kept too, so that their memory is not reused.
        self._kept: dict[tuple[object, ...], tuple[Any, Any]] = {}
        bases = [_backbone(model) for model in models]
        if not all(hasattr(base, _METHOD) and not _may_differ(base) for base in bases):
            return  # the models keep their methods, so `take` is never called
        for base in bases:
            vars(base)[_METHOD] = MethodType(_sharing(type(base)), base)  # a bound method, so copies call their own

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Within this context, features of the same pixel tensors are computed once. Its end frees them."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            self._kept.clear()
            _CURRENT.reset(token)

    def take(self, compute: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`compute(*args, **kwargs)`, or the result of an earlier forward if features are shared."""
        key = _key(args, kwargs)
        if self.is_shared and key in self._kept:
            return copy.copy(self._kept[key][0])  # a model may remove entries from it
        found = compute(*args, **kwargs)
        if _trains(compute.__self__, found):
            self.is_shared = False
        elif key not in self._kept:
            self._kept[key] = copy.copy(found), (args, kwargs)
        elif torch.is_grad_enabled() and not self._differs:
            self.is_shared = _are_equal(self._kept[key][0], found)
            self._differs = not self.is_shared
        return found


def _trains(base: Any, found: Any) -> bool:
    """Whether the features `found` have a gradient that reaches a trained weight.

    With adapters and gradient checkpointing, transformers makes embeddings require a gradient, although no weight below
    them trains.
    """
    if not any(tensor.requires_grad for tensor in _tensors(found)):
        return False
    return any(parameter.requires_grad for module in _below(base) for parameter in module.parameters(recurse=False))


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two results of `get_image_features` are equal within 4 eps of the largest entry: torch may choose other
    kernels when gradients are on."""
    for one, other in zip(_tensors(first), _tensors(second), strict=True):
        tolerance = 4 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0
        if one.numel() and not (one - other).abs().max() <= tolerance * one.abs().max():
            return False
    return True


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

    def of(value: Any) -> object:
        if isinstance(value, Tensor):
            return value.data_ptr(), value.shape, value.dtype
        return tuple(map(of, value)) if isinstance(value, list | tuple) else repr(value)

    return tuple((name, of(value)) for name, value in (*enumerate(args), *sorted(kwargs.items())))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([value[key] for key in sorted(value)])  # copies of outputs order their keys anew
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _backbone(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _may_differ(base: Any) -> bool:
    """Whether the vision path may give a model in training other features than its reference: it has dropout, batch
    normalization, or an adapter of peft (a layer with a `base_layer`).
    """
    vision = getattr(base.config, "vision_config", None)
    rates = [
        getattr(vision, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "dropout", "drop_path_rate")
    ]
    layers = (nn.modules.batchnorm._BatchNorm,)
    below = _below(base)
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in below)
    return any(rates) or drops or any(isinstance(module, layers) or hasattr(module, "base_layer") for module in below)


def _below(base: Any) -> list[nn.Module]:
    """The modules of a vision-language model that are not part of its language model."""
    decoder = set(base.get_decoder().modules())
    return [module for module in base.modules() if module not in decoder]
