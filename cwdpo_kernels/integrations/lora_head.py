"""Output heads as fused ops need them: plain linear layers, and peft's LoRA on one.

LoRA adds s * B A h to the logits. That is a wider product, [h, s A h] [W, B]^T, with r more columns, so the fused
ops compute it as any other head and B and A get exact gradients; W is never merged with B A.
The wide weight is a copy of W, V x (D + r), for the time of a step.
Nothing here imports peft: its layers are known by their attributes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .. import Head
from .._inputs import autocast


def linear_layers(head: nn.Module) -> list[nn.Module]:
    """The layers that a head's call may end in: itself, or the original and the trained copies that peft's
    `modules_to_save` holds. Empty where one of them is not linear."""
    copies = getattr(head, "modules_to_save", None)
    found = [head.original_module, *copies.values()] if hasattr(head, "original_module") and copies else [head]
    return found if all(_is_plain(layer) or is_lora(layer) for layer in found) else []


def _is_plain(layer: nn.Module) -> bool:
    # Other subclasses may compute something else (quantised weights). FSDP changes the class, not the forward.
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and _is_float(layer.weight)


def _is_float(weight: Tensor) -> bool:
    return weight.is_floating_point()


def is_lora(layer: nn.Module) -> bool:
    """Whether a layer is peft's LoRA of a plain linear layer, without a variant (DoRA and others)."""
    has_parts = all(hasattr(layer, name) for name in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters"))
    return has_parts and _is_plain(layer.base_layer) and not getattr(layer, "lora_variant", None)


def head_of(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Head]:
    """Hidden states [..., D'] and head [V, D'] whose product is what `layer` makes of `hidden` [..., D]."""
    if not is_lora(layer):
        return autocast(hidden, Head.of(layer))
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
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
