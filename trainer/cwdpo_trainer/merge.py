"""`cwdpo merge`: a full model from a base model and a trained adapter."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from cwdpo_trainer.config.arguments import ModelArguments
from cwdpo_trainer.config.sections import read_section
from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.files import check_writable_folder, replacing_folder, writing
from cwdpo_trainer.models.adapters import ADAPTER_FILE, base_model
from cwdpo_trainer.models.loading import load_model, load_processor
from cwdpo_trainer.reporter import say
from cwdpo_trainer.run_folder import RunFolder

SAMPLE = "The quick brown fox jumps over the lazy dog."  # whose logits are compared


def merge(target: Path, output: Path | None) -> Path:
    """Write the full model of the run, or of the adapter's folder, at `target` to `output`, and return that.

    The default is the folder `merged` in it. A quantized base model is loaded in full. Raises `InputError` if there is
    no adapter, if `output` exists, or if the logits of the merged model differ by more than rounding.
    """
    path, settings = _adapter(target)
    require((path / ADAPTER_FILE).is_file(), str(path), "", "an adapter, as a run with LoRA saves", "none")
    output = target / "merged" if output is None else output
    exists = os.path.lexists(output)
    require(not exists, str(output), "--output", "a folder that does not exist yet", "an existing file or folder")
    check_writable_folder(output.parent, str(output), "--output")
    settings = dataclasses.replace(settings, quantization=None)
    policy: PeftModel = load_model(settings, str(path), None, trainable=False)  # type: ignore[assignment]
    merged, difference = merged_model(policy, _sample(path))
    with writing(output, "the model"), replacing_folder(output) as unfinished:
        merged.save_pretrained(unfinished)
        _processor(path).save_pretrained(unfinished)
    say(f"{output}: the merged model; its logits are within {difference:.1e} of those with the adapter")
    return output


def _adapter(target: Path) -> tuple[Path, ModelArguments]:
    """The adapter's folder, and how to load its model."""
    folder = RunFolder(target)
    if not folder.is_run():
        return target, ModelArguments(str(target))
    done = folder.done_stages()
    require(bool(done), str(folder), "", "at least 1 finished stage", "none")
    folder.verify_model(done[-1])
    return folder.model(done[-1]), read_section(str(folder.record_file), "model", folder.recorded_config())


def _processor(path: Path) -> Any:
    own = (path / "tokenizer_config.json").is_file()
    return load_processor(str(path) if own else base_model(str(path)))


def _sample(path: Path) -> Tensor:
    processor = _processor(path)
    return getattr(processor, "tokenizer", processor)(SAMPLE, return_tensors="pt")["input_ids"]


@torch.no_grad()
def merged_model(policy: PeftModel, ids: Tensor) -> tuple[PreTrainedModel, float]:
    """`policy` with its adapter merged into the weights, and the largest difference of the logits for tokens `ids`.

    Raises `InputError` if that is more than rounding explains.
    """
    policy.eval()
    before = policy(input_ids=ids).logits.float()
    _untie(policy)
    wrapper: Any = policy  # the type that mypy finds for `merge_and_unload` is wrong
    merged: PreTrainedModel = wrapper.merge_and_unload()
    difference = (merged(input_ids=ids).logits.float() - before).abs().max().item()
    tolerance = max(1e-4, 16 * torch.finfo(merged.dtype).eps) * max(1.0, before.abs().max().item())
    expected = f"logits within {tolerance:.1e} of those with the adapter"
    if not difference <= tolerance:
        raise InputError(str(merged.config.name_or_path), "merged model", expected, f"a difference of {difference:.1e}")
    return merged, difference


def _untie(policy: PeftModel) -> None:
    """Give an adapted head a weight of its own, or merging would also change the embeddings that it is tied to."""
    model: Any = policy.get_base_model()
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    weights = [getattr(module, "base_layer", module) for module in (head, embeddings)]
    is_adapted = any(hasattr(module, "base_layer") for module in (head, embeddings))
    if is_adapted and weights[0].weight is weights[1].weight:
        weights[0].weight = nn.Parameter(weights[0].weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
