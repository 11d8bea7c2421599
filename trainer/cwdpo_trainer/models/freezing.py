"""Freezes the modules that `model.freeze` names, with LoRA and without.

A name such as `vision_tower` stands for every module that has it in its path, and for all modules inside.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from cwdpo_trainer.errors import require
from cwdpo_trainer.reporter import say


def is_inside(name: str, frozen: Sequence[str]) -> bool:
    """Whether the module or parameter `name` is, or is inside, one of the `frozen` modules."""
    return any(f".{part}." in f".{name}." for part in frozen)


def freeze(model: nn.Module, frozen: Sequence[str]) -> None:
    """Freeze the parameters of the modules `frozen`. Raises `InputError` about a name without parameters, and if
    nothing is left to train."""
    trains = any(parameter.requires_grad for parameter in model.parameters())  # a quantized model trains adapters only
    for part in frozen:
        found = [parameter for name, parameter in model.named_parameters() if is_inside(name, [part])]
        modules = sorted({name for name, module in model.named_modules() if name and name.count(".") <= 1})
        require(bool(found), "config", "model.freeze", f"names of modules, such as {', '.join(modules)}", repr(part))
        for parameter in found:
            parameter.requires_grad_(False)
    left = any(parameter.requires_grad for parameter in model.parameters())
    require(left or not trains, "config", "model.freeze", "weights outside of these modules", list(frozen))


def exclude_frozen(config: LoraConfig, frozen: Sequence[str]) -> None:
    """Change `config` in place so that it also excludes all modules inside `frozen`."""
    if not frozen:
        return
    others = config.exclude_modules or []
    # Peft matches the entries of a list with the ends of names, and a string as a regular expression with whole names.
    kept = [others] if isinstance(others, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(others)]
    inside = [rf"(?:.*\.)?{re.escape(name)}(?:\..*)?" for name in frozen]
    config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in [*kept, *inside])


def left_without_adapter(policy: PeftModel, config: LoraConfig, excluded: str | list[str] | None) -> list[str]:
    """Names of the modules that get no adapter because they are frozen: they would have one if `config` excluded only
    `excluded`, the user's own setting."""
    open_config = copy.copy(config)
    open_config.exclude_modules = excluded
    names = {name for name, module in policy.get_base_model().named_modules() if "weight" in module._parameters}
    return sorted(name for name in names if check_target_module_exists(open_config, name) and _is_frozen(config, name))


def _is_frozen(config: LoraConfig, name: str) -> bool:
    return re.fullmatch(str(config.exclude_modules), name) is not None


def freeze_adapters(policy: PeftModel, frozen: Sequence[str]) -> list[str]:
    """Freeze the adapter's weights inside the modules `frozen`. Returns the names of the modules affected.

    Raises `InputError` if nothing is left to train.
    """
    found = set()
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and is_inside(name, frozen):
            parameter.requires_grad_(False)
            found.add(re.sub(r"\.(lora_|modules_to_save\.).*", "", name))
    trained = any(parameter.requires_grad for parameter in policy.parameters())
    require(trained, "config", "model.freeze", "an adapter with weights outside of these modules", list(frozen))
    return sorted(found)


def say_frozen(count: int, what: str, frozen: Sequence[str]) -> None:
    """Print that `count` modules inside `frozen` are left out, and `what` follows for them. Prints nothing for 0."""
    if count:
        modules = "module" if count == 1 else "modules"
        say(f"lora: {count} {modules} inside {', '.join(frozen)}: {what} (model.freeze)")
