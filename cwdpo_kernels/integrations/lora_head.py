"""The output head as (hidden, Head) for fused ops: plain linear layers, and peft's LoRA on one.

LoRA of rank r adds s * B A h to the logits. This equals a product with r more columns, [h, s A h] [W, B]^T, so the
fused ops compute it like any other head and give exact gradients to A and B. W is never merged with B A. During a step
the wide weight is a copy, V x (D + r).

This module does not import peft; it recognizes peft's layers by their attributes.
"""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .. import Head
from .._inputs import autocast
from .module_types import LoraLinear


def linear_layers(head: nn.Module) -> list[nn.Module]:
    """The layers that may compute the head's output; empty if one of them is not linear.

    The head itself, or the original and the trained copies under peft's `modules_to_save`.
    """
    copies = getattr(head, "modules_to_save", None)
    found = [head]
    if hasattr(head, "original_module") and copies:
        found = [head.get_submodule("original_module"), *copies.values()]
    return found if all(_is_plain(layer) or is_lora(layer) for layer in found) else []


def _is_plain(layer: nn.Module) -> bool:
    # A subclass with its own forward may compute something else (quantized weights). FSDP swaps the class, but keeps
    # the forward.
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and _is_float(layer.weight)


def _is_float(weight: Tensor) -> bool:
    return weight.is_floating_point()


def is_lora(layer: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether a layer is peft's LoRA on a plain linear layer, and not a variant such as DoRA."""
    has_parts = all(hasattr(layer, name) for name in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters"))
    if not has_parts or getattr(layer, "lora_variant", None):
        return False
    return _is_plain(layer.get_submodule("base_layer"))


def head_of(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Head]:
    """Hidden states [..., D'] and head [V, D'] whose product equals `layer(hidden)` for `hidden` [..., D]."""
    if not is_lora(layer):
        return autocast(hidden, Head.of(layer))
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    hidden, head = autocast(hidden, Head.of(layer.base_layer))
    if layer.disable_adapters or layer.merged:
        return hidden, head
    columns, weights, bias = [hidden], [head.weight], head.bias
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
            inner = down(layer.lora_dropout[name](hidden.to(down.weight.dtype)))
            columns.append((inner * scaling).to(hidden.dtype))
            weights.append(up.weight.to(hidden.dtype))
            if up.bias is not None:
                added = (up.bias * scaling).to(hidden.dtype)
                bias = added if bias is None else bias + added
    return torch.cat(columns, -1), dataclasses.replace(head, weight=torch.cat(weights, 1), bias=bias)
