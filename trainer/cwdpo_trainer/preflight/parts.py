"""Divides a model into vision tower, connector, language model and head, by the names of its modules, and counts the
trained parameters of each."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from cwdpo_trainer.models.loading import without_adapters

VISION, CONNECTOR, LANGUAGE, HEAD = "vision tower", "connector", "language model", "head"
LONGEST_PERIOD = 6  # layers
_WRAPPED = "base_model.model."  # peft puts this before the names of the wrapped model's modules


def parts_of(model: nn.Module) -> dict[str, str]:
    """Module name -> part, for the modules that make up the parts.

    The language model is the child of the backbone that has the token embeddings. Other children are vision towers if
    their name says so (`visual`, `vision_tower`, `image_encoder`), else connectors. A `merger` inside a vision tower is
    a connector too.
    """
    base: Any = without_adapters(model)
    names = {module: name for name, module in base.named_modules()}
    backbone, embeddings = base.base_model, base.get_input_embeddings()
    prefix = names[backbone]
    parts: dict[str, str] = {}
    for name, child in backbone.named_children():
        if next(child.parameters(), None) is None:
            continue
        if embeddings is child:
            parts = {}
            break
        is_vision = "vis" in name or "image" in name
        inside = embeddings in set(child.modules())
        parts[f"{prefix}.{name}"] = LANGUAGE if inside else VISION if is_vision else CONNECTOR
        if is_vision:
            inner = {f"{prefix}.{name}.{part}": CONNECTOR for part, _ in child.named_children() if "merger" in part}
            parts |= inner
    parts = parts or {prefix: LANGUAGE}
    return parts | {names[base.get_output_embeddings()]: HEAD}


def marked_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(part, module) for each module of `parts_of`."""
    base = without_adapters(model)
    return [(part, base.get_submodule(name)) for name, part in parts_of(model).items()]


def parameter_report(model: nn.Module) -> list[str]:
    """A line about each part (its parameters, how many are trained in full, and how many in LoRA adapters), and one
    about the whole model."""
    parts = parts_of(model)
    total, full, lora = Counter[str](), Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        inner = name.removeprefix(_WRAPPED)
        module = max((each for each in parts if f"{inner}.".startswith(f"{each}.")), key=len, default="")
        (lora if "lora_" in inner else total)[module] += parameter.numel()
        if parameter.requires_grad and "lora_" not in inner:
            full[module] += parameter.numel()
    lines = []
    for module, part in parts.items():
        if not total[module]:
            lines.append(f"{part} ({module}): the weights of the token embeddings")
            continue
        trained = [f"{full[module]:,} trained in full"] if full[module] else []
        trained += [f"{lora[module]:,} trained in LoRA adapters"] if lora[module] else []
        lines.append(f"{part} ({module}): {total[module]:,} parameters, {' and '.join(trained) or 'frozen'}")
    everything = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return [*lines, f"trained: {everything:,} of {sum(each.numel() for each in model.parameters()):,} parameters"]


def stacks_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of at least two layers of one class, by name: the layers of a language model, the blocks of a
    vision tower."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside and len(set(map(type, module))) == 1:
            stacks[name] = module
    return stacks


def period_of(model: nn.Module, layers: nn.ModuleList) -> int | None:
    """The smallest p for which layer i + p of a stack is like layer i, judging by shapes and kinds of attention. None
    if there is no p up to `LONGEST_PERIOD`, or if layers of this stack also feed other modules (deep-stack
    features)."""
    if any(hasattr(module, "deepstack_visual_indexes") and layers in module.children() for module in model.modules()):
        return None
    kinds = [
        (getattr(layer, "layer_type", getattr(layer, "attention_type", None)),
         getattr(getattr(layer, "self_attn", None), "sliding_window", None),
         [(name, each.shape, each.requires_grad) for name, each in layer.named_parameters()])
        for layer in layers
    ]  # fmt: skip
    return next((p for p in range(1, LONGEST_PERIOD + 1) if kinds[p:] == kinds[:-p]), None)
