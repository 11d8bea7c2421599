"""Tiny text-only models with their tokenizers, and preference pairs without images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["ask", "answer", "red", "green", "blue", "left", "right", "above", "below", "and", "a", "the", "square", "is"]
SPECIAL = ["<s>", "</s>", "<unk>", "<user>", "<bot>"]
VOCAB = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
# As templates of text-only models do, it adds texts up: message parts would fail.
TEMPLATE = (
    "{% for message in messages %}{{ ('<user> ' if message['role'] == 'user' else '<bot> ') + message['content'] "
    "+ ' </s> ' }}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCAB), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
    "tied": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),  # as SmolLM2
    "gemma3_text": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8),
}


def tokenizer(template: bool = True) -> hf.PreTrainedTokenizerFast:
    """One token a word. Without a pad token, as Llama's."""
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<bot>"],
    )  # fmt: skip
    made.chat_template = TEMPLATE if template else None
    return made


def save_text_model(folder: Path, name: str = "llama") -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def text_rows(indices: range, chat: bool) -> list[dict[str, Any]]:
    """Different pairs for up to 48 indices. Prompts are text or messages; every other message has parts."""
    rows = []
    for index in indices:
        color, other = WORDS[2 + index % 3], WORDS[2 + (index + 1) % 3]
        question = f"ask {WORDS[9 + index // 12]} {WORDS[5 + index % 4]} {color}"
        content: Any = question if index % 2 else [{"type": "text", "text": question}]
        rows.append({
            "prompt": [{"role": "user", "content": content}] if chat else question,
            "chosen": f"a {color} square",
            "rejected": f"a {other} square" if index % 2 else "and and left below above",
            "references": [f"a {color} square", f"the {color} square"],
            "negative_source": "near" if index % 2 else "easy",
        })  # fmt: skip
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
