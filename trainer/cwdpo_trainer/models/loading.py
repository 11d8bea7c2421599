"""Load models, processors and the weights of checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.errors import require, shorten
from cwdpo_trainer.files import user_path
from cwdpo_trainer.models.adapters import (
    POLICY,
    adapter_weights,
    base_model,
    existing_base,
    prepared_for_adapters,
    trained_adapter,
    with_adapter,
)
from cwdpo_trainer.models.freezing import freeze
from cwdpo_trainer.models.kinds import EXPECTED, auto_class, is_text_only, read_config
from cwdpo_trainer.models.reading import loading

Model = PreTrainedModel | PeftModel
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
LONGEST_NAME = 96  # characters


def load_model(
    settings: ModelArguments, path: str, lora: LoraArguments | None, trainable: bool = True, base: str | None = None
) -> Model:
    """The model at `path`: a folder, which may hold an adapter only, or a name on the Hub.

    `base`: where the base model of such an adapter is now, if it may have moved since the adapter was saved.

    `trainable`: freeze the modules in `settings.freeze` and, if `lora` is set and `path` holds no adapter, add one.
    Raises `InputError` if there is no such model, or if the options do not fit it.
    """
    recorded = base_model(path)
    is_adapter = recorded != path
    model = _load(settings, base if is_adapter and base is not None else existing_base(path))
    if is_adapter:
        model = prepared_for_adapters(model, settings) if trainable else model
        return trained_adapter(model, path, settings.freeze if trainable else None)
    if not trainable:
        return model
    kind = settings.quantization
    require(kind is None or lora is not None, "config", "model.quantization", "null without a section lora", kind)
    freeze(model, settings.freeze)
    return model if lora is None else with_adapter(model, settings, lora)


def move(model: nn.Module, device: torch.device) -> None:
    """Move `model` to `device`, in place. Quantized weights stay on the device that they were loaded on."""
    if _quantization_method(model) is None:
        model.to(device)


def load_processor(path: str) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of the model at `path`; of a text-only model, its tokenizer. Raises `InputError` if there is none.

    A tokenizer without a pad token gets the end of sequence as one. Labels and masks are made from lengths, so the
    model never sees the difference.
    """
    if is_text_only(path):
        with loading(path, EXPECTED):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    with loading(path, EXPECTED):
        # Without a value, transformers asks on the terminal whether to run code that came with the model.
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    usable = hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")
    require(usable, path, "processor", "a tokenizer and an image_processor", type(processor).__name__)
    return processor


def model_path(config: RunConfig) -> str:
    """The absolute path of the model's folder, or the model's name on the Hub if there is no such folder."""
    return folder_or_name(config.where, "model.path", config.model.path, config.base)


def folder_or_name(where: str, what: str, text: str, base: Path | None = None) -> str:
    """The absolute path of the model folder that a user wrote, or `text` itself if it can be a name on the Hub.

    It is absolute because an adapter stores it. `where` and `what` name the setting in an error.
    """
    folder = (base or Path()) / user_path(text)
    if os.path.isdir(folder):  # false, where `Path.is_dir` raises, for a name that is too long
        return str(folder.resolve())
    is_name = len(text) <= LONGEST_NAME and HUB_NAME.fullmatch(text) is not None
    require(is_name, where, what, "an existing folder or a name on the Hub", shorten(folder))
    return text


def _load(settings: ModelArguments, path: str) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.quantization is not None:
        options["quantization_config"] = _quantization(settings)
    kind = auto_class(path, read_config(path))
    with loading(path, f"a model that loads with {options or 'default options'}"):
        return kind.from_pretrained(path, dtype=settings.torch_dtype, trust_remote_code=False, **options)


def _quantization(settings: ModelArguments) -> BitsAndBytesConfig:
    """8-bit integers, or as in QLoRA 4-bit normal floats with quantized constants."""
    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.bfloat16 if settings.dtype == "auto" else settings.torch_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_quantization(model: Model, device: torch.device) -> None:
    """Raise `InputError` for quantized weights on a CPU.

    After a forward in evaluation mode, bitsandbytes uses a CPU kernel without a gradient, and training would continue
    with wrong gradients.
    """
    kind = _quantization_method(model)
    supported = kind is None or device.type != "cpu"
    require(supported, "config", "model.quantization", "null on a CPU", getattr(kind, "value", kind))


def _quantization_method(model: nn.Module) -> Any:
    return getattr(without_adapters(model), "quantization_method", None)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that peft wraps, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_weights(model: Model, folder: str) -> None:
    """Load the weights of a checkpoint into `model`. Raises if any are missing.

    Some models, LLaVA among them, are saved under the weight names of earlier releases, which `from_pretrained`
    converts. The library's own resume does not: it skips names that it does not find, and silently continues with the
    weights that the model already has.
    """
    if isinstance(model, PeftModel):
        stored = load_peft_weights(folder, device="cpu")
        different = sorted(set(adapter_weights(model)) ^ set(stored))
        expected = "an adapter with the weights of this run's"
        require(not different, folder, "", expected, f"other weights: {', '.join(different[:5])}")
        set_peft_model_state_dict(model, stored, adapter_name=POLICY)
        return
    kinds = type(model).__mro__  # FSDP2 puts a class of its own in front of the model's
    plain = next(kind for kind in kinds if issubclass(kind, PreTrainedModel) and not issubclass(kind, FSDPModule))
    weights = plain.from_pretrained(folder, dtype=model.dtype).state_dict()
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)
