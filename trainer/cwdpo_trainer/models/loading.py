"""Models of a run: loaded, adapted, saved by any stage and loaded again; and the frozen reference of a stage.

Without LoRA the reference is a frozen copy of the policy. With LoRA it is the policy itself with another adapter
in place: none where the stage starts from a new adapter (which changes nothing yet), else a frozen copy of the
adapter that the stage starts from. That costs the adapter's memory, not the model's.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.errors import InputError, describe, require

POLICY, REFERENCE = "default", "reference"  # names of adapters
ADAPTER_FILE = "adapter_config.json"
Model = PreTrainedModel | PeftModel


def load_model(settings: ModelArguments, path: str, lora: LoraArguments | None, trainable: bool = True) -> Model:
    """The model in the folder `path` (or of that name on the Hub), which may hold an adapter, as a stage saves it.

    `trainable`: with `lora` a model without an adapter gets one (new, or the one at `lora.adapter`), and
    `settings.freeze` takes effect.
    """
    base = base_model(path)
    if base != path:
        model = _for_adapters(_load(settings, base), settings) if trainable else _load(settings, base)
        return _saving_the_policy(PeftModel.from_pretrained(model, path, is_trainable=trainable))
    model = _load(settings, path)
    if not trainable:
        return model
    kind = settings.quantization
    require(kind is None or lora is not None, "config", "model.quantization", "null without a section lora", kind)
    _freeze(model, settings.freeze)
    return model if lora is None else _with_adapter(model, settings, lora)


def load_processor(path: str) -> ProcessorMixin:
    """The processor of the model at `path`. Raises `InputError` where there is none for text and images."""
    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:  # some processors need torchvision
        raise InputError(path, "", "a vision-language model with its processor", describe(error)) from error
    usable = hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")
    require(usable, path, "processor", "a tokenizer and an image_processor", type(processor).__name__)
    return processor


def model_path(config: RunConfig) -> str:
    """The folder of the model if there is one, else its name on the Hub."""
    path = config.model.path
    local = config.base / Path(path).expanduser()
    require(local.is_dir() or path[0] not in "./~", "config", "model.path", "an existing folder", local)
    return str(local.resolve()) if local.is_dir() else path  # an adapter remembers it


def base_model(path: str) -> str:
    """`path`, or the model below it where `path` holds an adapter."""
    adapter = Path(path, ADAPTER_FILE)
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else path


def _load(settings: ModelArguments, path: str) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.quantization is not None:
        options["quantization_config"] = _quantization(settings)
    try:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=settings.torch_dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        expected = f"a vision-language model that loads with {options or 'default options'}"
        raise InputError(path, "", expected, describe(error)) from error


def _quantization(settings: ModelArguments) -> BitsAndBytesConfig:
    """QLoRA's: normal floats of 4 bits whose constants are quantised too, or integers of 8 bits."""
    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.bfloat16 if settings.dtype == "auto" else settings.torch_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_quantization(model: Model, device: torch.device) -> None:
    """Refuse quantised weights on a CPU: after a forward in evaluation mode bitsandbytes computes them there by a
    kernel without a gradient, and training would go on with wrong ones."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = getattr(base, "quantization_method", None)
    fine = kind is None or device.type != "cpu"
    require(fine, "config", "model.quantization", "null on a CPU", getattr(kind, "value", kind))


def _freeze(model: nn.Module, prefixes: list[str]) -> None:
    for prefix in prefixes:
        found = [parameter for name, parameter in model.named_parameters() if f".{prefix}." in f".{name}"]
        modules = sorted({name for name, module in model.named_modules() if name and name.count(".") <= 1})
        require(bool(found), "config", "model.freeze", f"names of modules, such as {', '.join(modules)}", repr(prefix))
        for parameter in found:
            parameter.requires_grad_(False)


def _for_adapters(model: PreTrainedModel, settings: ModelArguments) -> PreTrainedModel:
    """Quantised weights as adapters are trained on them: frozen, the layers that are not quantised in float32."""
    if settings.quantization is None:
        return model
    # The stage's arguments decide about checkpoints of activations.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _with_adapter(model: PreTrainedModel, settings: ModelArguments, lora: LoraArguments) -> PeftModel:
    model = _for_adapters(model, settings)
    try:
        if lora.adapter is not None:
            return _saving_the_policy(PeftModel.from_pretrained(model, lora.adapter, is_trainable=True))
        config = LoraConfig(
            r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, use_rslora=lora.use_rslora,
            target_modules=lora.target_modules, exclude_modules=lora.exclude_modules,
            modules_to_save=lora.modules_to_save, task_type="CAUSAL_LM",
        )  # fmt: skip
        return _saving_the_policy(get_peft_model(model, config))
    except (OSError, ValueError) as error:
        raise InputError("config", "lora", "options that fit the model", describe(error)) from error


def _saving_the_policy(policy: PeftModel) -> PeftModel:
    """Peft would also save the adapter of the reference, and beside an adapter on the head the whole head, for
    vocabularies that have grown; ours do not."""
    policy.save_pretrained = functools.partial(
        policy.save_pretrained, save_embedding_layers=False, selected_adapters=[POLICY]
    )
    return policy


def _adapter_weights(policy: PeftModel) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(policy, adapter_name=POLICY, save_embedding_layers=False)


def load_weights(model: Model, folder: str) -> None:
    """The weights of a checkpoint of `model`, all of them or an error.

    Some models, LLaVA among them, are saved under the names that earlier releases gave their weights. The
    library's own resume looks for the names of today, skips what it does not find, and trains on with the
    weights that happen to be there. `from_pretrained` knows both.
    """
    if isinstance(model, PeftModel):
        stored = load_peft_weights(folder, device="cpu")
        wanted = set(_adapter_weights(model))
        missing = sorted(wanted ^ set(stored))
        require(
            not missing,
            folder,
            "",
            "an adapter with the weights of this run's",
            f"other weights: {', '.join(missing[:5])}",
        )
        set_peft_model_state_dict(model, stored, adapter_name=POLICY)
        return
    plain = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    weights = plain.from_pretrained(folder, dtype=model.dtype).state_dict()
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def freeze_reference(policy: Model) -> nn.Module:
    """The model that `policy` is now, frozen, in evaluation mode: the reference of the stage that begins."""
    if not isinstance(policy, PeftModel):
        return copy.deepcopy(policy).eval().requires_grad_(False)
    if REFERENCE in policy.peft_config:
        policy.delete_adapter(REFERENCE)
    if _changes_nothing(policy):
        return AdapterReference(policy, None)
    weights = _adapter_weights(policy)
    policy.add_adapter(REFERENCE, policy.peft_config[POLICY])
    set_peft_model_state_dict(policy, {name: value.clone() for name, value in weights.items()}, REFERENCE)
    policy.set_adapter(POLICY)
    return AdapterReference(policy, REFERENCE)


def _changes_nothing(policy: PeftModel) -> bool:
    """A new adapter: every B is zero, and no module is trained as a whole."""
    weights = _adapter_weights(policy)
    ups = {name: value for name, value in weights.items() if "lora_B" in name or "lora_embedding_B" in name}
    downs = {name for name in weights if "lora_A" in name or "lora_embedding_A" in name}
    return weights.keys() == ups.keys() | downs and not any(bool(value.any()) for value in ups.values())


class AdapterReference(nn.Module):
    """A peft model with another of its adapters in place (None: with none), without gradients and dropout.

    It shares the weights of `policy` and does not own them: `parameters()` is empty. Calls and `generate` put the
    adapter in place for their time, under `precision()`: the autocast that the policy gets once it is in training.
    """

    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __init__(self, policy: PeftModel, adapter: str | None) -> None:
        super().__init__()
        self._shared = (policy,)  # a tuple, so that it is no submodule
        self.adapter = adapter
        self.eval()

    @property
    def device(self) -> torch.device:
        return self._shared[0].device

    def move(self, device: torch.device) -> None:
        """Move the policy, which is no submodule that `to` would reach; quantised ones are in their place already."""
        if self.device.type != device.type:
            self._shared[0].to(device)

    @property
    def generation_config(self) -> GenerationConfig:
        return self._shared[0].generation_config

    def forward(self, **inputs: Any) -> Any:
        with self._in_place() as model:
            return model(**inputs)

    def generate(self, **options: Any) -> Any:
        with self._in_place() as model:
            return model.generate(**options)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[PeftModel]:
        policy = self._shared[0]
        training = [module for module in policy.modules() if module.training]
        policy.eval()
        try:
            with torch.no_grad(), self.precision(), _adapter(policy, self.adapter):
                yield policy
        finally:
            for module in training:
                module.training = True


def describe_reference(reference: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a reference of `freeze_reference` computes with: its settings, and its weights by name, those of other
    adapters left out."""
    if not isinstance(reference, AdapterReference):
        return {"model": type(reference).__name__, "config": reference.config.to_dict()}, reference.state_dict()
    policy, adapter = reference._shared[0], reference.adapter
    settings = {"model": type(policy.get_base_model()).__name__, "config": policy.get_base_model().config.to_dict()}
    if adapter is not None:
        settings["adapter"] = policy.peft_config[adapter].to_dict()
    others = policy.peft_config.keys() - {adapter}
    weights = {name: value for name, value in policy.state_dict().items() if others.isdisjoint(name.split("."))}
    return settings, weights


@contextlib.contextmanager
def _adapter(policy: PeftModel, name: str | None) -> Iterator[None]:
    """Another adapter, or none, for a while.

    Peft's own ways to do so also freeze the parameters of the adapter that is put aside. A sharded parameter
    remembers that (FSDP builds its gathered form once), and it would then never get a gradient.
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
