"""Fixtures: the preference tasks of the TRL tests, with images and without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from dpo_task import Task


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(load_example):
    return load_example("tiny_llava")


@pytest.fixture(params=["images", "text"])
def task(request, tiny, tmp_path):
    """A saved model, its processing class and preference pairs."""
    model, processor = tiny["tiny_llava"]()
    rows = tiny["color_pairs"](16)
    if request.param == "text":
        config = LlamaConfig(
            vocab_size=len(tiny["WORDS"]), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model, processor = LlamaForCausalLM(config), processor.tokenizer
        rows = [{**row, "prompt": "<s> describe"} for row in rows]
        for row in rows:
            del row["images"]
    model.save_pretrained(tmp_path / "model")
    return Task(tmp_path / "model", model, processor, Dataset.from_list(rows))
