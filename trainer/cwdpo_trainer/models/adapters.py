"""LoRA adapters of a policy: how they are created, saved and switched.

A policy with LoRA has the adapter POLICY, which is trained. It may have a second one, REFERENCE (reference.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.errors import InputError, describe, require
from cwdpo_trainer.files import read_json_object
from cwdpo_trainer.models.freezing import exclude_frozen, freeze_adapters, left_without_adapter, say_frozen
from cwdpo_trainer.models.reading import loading

POLICY, REFERENCE = "default", "reference"
ADAPTER_FILE = "adapter_config.json"


def base_model(path: str) -> str:
    """The model that the adapter at `path` belongs to; `path` itself if it holds no adapter."""
    adapter = Path(path, ADAPTER_FILE)
    if not adapter.is_file():
        return path
    name = read_json_object(adapter).get("base_model_name_or_path")
    if not (isinstance(name, str) and name):
        raise InputError(str(adapter), "base_model_name_or_path", "a name or a path", repr(name))
    return name


def existing_base(path: str) -> str:
    """`base_model(path)`. Raises `InputError` if it is a folder that is no longer there."""
    base = base_model(path)
    is_gone = os.path.isabs(base) and not os.path.isdir(base)
    if base != path and is_gone:
        expected = "the folder of the adapter's base model (if it has moved, make a link to it there)"
        raise InputError(
            str(Path(path, ADAPTER_FILE)), "base_model_name_or_path", expected, f"{base}, which is missing"
        )
    return base


def with_adapter(model: PreTrainedModel, settings: ModelArguments, lora: LoraArguments) -> PeftModel:
    """The model with a trainable adapter: a new one, or the one at `lora.adapter`. Raises `InputError`.

    Nothing inside of `settings.freeze` is trained.
    """
    model = prepared_for_adapters(model, settings)
    frozen = settings.freeze
    if lora.adapter is not None:
        return trained_adapter(model, lora.adapter, frozen)
    policy, config = new_adapter(model, lora, frozen)
    left_out = left_without_adapter(policy, config, lora.exclude_modules) if frozen else []
    say_frozen(len(left_out), "no adapter", frozen)
    say_frozen(len(freeze_adapters(policy, frozen)), "not trained in full", frozen)  # of modules_to_save
    return policy


def check_module_names(model: PreTrainedModel, lora: LoraArguments) -> None:
    """Raise `InputError` for a name in a list of `lora` that no module of the model has: peft would ignore it."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(lora, option)
        listed = names if isinstance(names, list) else []  # a text is "all-linear" or a pattern
        dot = "" if option == "modules_to_save" else "."  # there peft compares the ends of names, not whole parts
        unknown = [name for name in listed if not any(module.endswith(dot + name) for module in modules)]
        require(not unknown, "config", f"lora.{option}", "names of the model's modules", ", ".join(unknown))


def new_adapter(model: PreTrainedModel, lora: LoraArguments, frozen: Sequence[str]) -> tuple[PeftModel, LoraConfig]:
    """The model with a new adapter outside of the modules `frozen`, and the adapter's config. Raises `InputError`."""
    check_module_names(model, lora)
    try:
        config = LoraConfig(
            r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, use_rslora=lora.use_rslora,
            target_modules=lora.target_modules, exclude_modules=lora.exclude_modules,
            modules_to_save=lora.modules_to_save, task_type="CAUSAL_LM",
        )  # fmt: skip
        exclude_frozen(config, frozen)
        policy = saving_policy_only(get_peft_model(model, config))
    except Exception as error:  # peft raises many types
        expected = "options that fit the model"
        expected += f", with modules outside of model.freeze ({', '.join(frozen)})" if frozen else ""
        raise InputError("config", "lora", expected, describe(error)) from error
    return policy, config


def trained_adapter(model: PreTrainedModel, path: str, frozen: Sequence[str] | None) -> PeftModel:
    """The model with the adapter at `path`, a folder or a name on the Hub. Raises `InputError`.

    The adapter is trained outside of the modules `frozen`; None: it is not trained.
    """
    with loading(path, "an adapter that fits the model"):
        policy = saving_policy_only(PeftModel.from_pretrained(model, path, is_trainable=frozen is not None))
    # The model may have moved since the adapter was saved; what is saved from now on names where it is.
    policy.peft_config[POLICY].base_model_name_or_path = model.name_or_path
    if frozen:
        say_frozen(len(freeze_adapters(policy, frozen)), "adapter kept as it is", frozen)
    return policy


def prepared_for_adapters(model: PreTrainedModel, settings: ModelArguments) -> PreTrainedModel:
    """Quantized weights as adapters need them: all frozen, and the layers that are not quantized in float32."""
    if settings.quantization is None:
        return model
    # The options of a stage decide about gradient checkpointing.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def saving_policy_only(policy: PeftModel) -> PeftModel:
    """Make `policy.save_pretrained` save the trained adapter only.

    By default, peft also saves the reference's adapter. With an adapter on the head it also saves the whole head, in
    case the vocabulary has grown; it never grows here. It leaves an empty model card in every folder; ours is written
    by the report.
    """
    policy.create_or_update_model_card = lambda output_dir: None  # type: ignore[method-assign]
    policy.save_pretrained = functools.partial(  # type: ignore[method-assign]  # peft has no setting for these defaults
        policy.save_pretrained, save_embedding_layers=False, selected_adapters=[POLICY]
    )
    return policy


def adapter_weights(policy: PeftModel) -> dict[str, Tensor]:
    """The weights of the trained adapter, by the names that peft saves them under."""
    return get_peft_model_state_dict(policy, adapter_name=POLICY, save_embedding_layers=False)


def changes_nothing(policy: PeftModel) -> bool:
    """Whether the adapter has no effect yet: every B is zero, and no module is trained in full."""
    weights = adapter_weights(policy)
    ups = {name: value for name, value in weights.items() if "lora_B" in name or "lora_embedding_B" in name}
    downs = {name for name in weights if "lora_A" in name or "lora_embedding_A" in name}
    return weights.keys() == ups.keys() | downs and not any(bool(value.any()) for value in ups.values())


@contextlib.contextmanager
def switched_adapter(policy: PeftModel, name: str | None) -> Iterator[None]:
    """Inside, the adapter `name` is active; None: no adapter is.

    Peft's own context managers also freeze the parameters of the inactive adapter. FSDP builds the gathered form of a
    parameter once, and one built while it is frozen never gets a gradient again.
    """
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = name is None
            layer._active_adapter = layer._active_adapter if name is None else [name]
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
