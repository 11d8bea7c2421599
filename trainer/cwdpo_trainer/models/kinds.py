"""Which kind of model a config describes: a vision-language model or a text-only one."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.adapters import existing_base
from cwdpo_trainer.models.reading import loading

EXPECTED = "a vision-language model with its processor, or a text-only model with its tokenizer"


def read_config(path: str) -> Any:
    """The config of the model at `path`, or of the base model of the adapter there. Raises `InputError`."""
    path = existing_base(path)
    with loading(path, EXPECTED):
        # Without a value, transformers asks on the terminal whether to run code that came with the model.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def auto_class(path: str, config: Any) -> Any:
    """transformers' auto class that loads the model at `path`, which has `config`. A config that belongs to both kinds
    counts as a vision-language model. Raises `InputError` if it belongs to neither.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    raise InputError(path, "model_type", EXPECTED, repr(config.model_type))


def is_text_only(path: str) -> bool:
    """Whether the model at `path` reads no images. Raises `InputError` if its kind is unknown."""
    return auto_class(path, read_config(path)) is AutoModelForCausalLM
