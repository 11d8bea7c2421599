"""Types of the attributes that this package uses of Hugging Face's and peft's modules.

torch declares every attribute of a module as `Tensor | Module`. The classes here declare more precise types. They are
never instantiated: each function recognizes a module by its attributes and tells the type checker which class
describes it. Neither transformers nor peft is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeGuard

from torch import nn


class LanguageModel(nn.Module):
    """A `transformers.PreTrainedModel`."""

    base_model: nn.Module
    get_input_embeddings: Callable[[], nn.Embedding]
    get_output_embeddings: Callable[[], nn.Module | None]


class PeftModel(nn.Module):
    """A `peft.PeftModel`."""

    get_base_model: Callable[[], nn.Module]


class SizedLayer(nn.Module):
    """A linear layer, or a wrapper with the sizes of one."""

    in_features: int
    out_features: int


class LoraLinear(nn.Module):
    """A `peft.tuners.lora.Linear`. The keys of its mappings are the adapters' names."""

    base_layer: nn.Linear
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_dropout: Mapping[str, nn.Module]
    scaling: Mapping[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    unmerge: Callable[[], None]


def is_language_model(model: nn.Module) -> TypeGuard[LanguageModel]:
    return hasattr(model, "get_output_embeddings")


def is_peft_model(model: nn.Module) -> TypeGuard[PeftModel]:
    return hasattr(model, "get_base_model")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP 1 and peft wrappers, which hide its signature."""
    model = getattr(model, "module", model)
    return model.get_base_model() if is_peft_model(model) else model


def is_sized(layer: nn.Module) -> TypeGuard[SizedLayer]:
    return hasattr(layer, "in_features") and hasattr(layer, "out_features")
