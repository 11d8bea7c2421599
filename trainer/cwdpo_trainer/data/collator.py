"""Turns rows into model inputs, in two steps, because a pair's negative may change in between.

`PairCollator` runs the processor on the prompts and tokenizes the answers. `with_answers` joins prompts and answers
into one padded batch with aligned labels. Training calls it inside the step, after on-policy negatives are mixed in: a
data loader prefetches batches, and would have to sample them from a policy that is out of date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ProcessorMixin

from cwdpo_kernels import IGNORE_INDEX, shift_labels
from cwdpo_trainer.chat_templates import render
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import require

Tokens = list[int]


class Batch(NamedTuple):
    """`inputs` of the model for S sequences, and `labels` [S, T] aligned with the hidden states that predict them."""

    inputs: dict[str, Tensor]
    labels: Tensor


class PairCollator:
    """Collates P rows to {"prompts": the processor's outputs, "rows": ids, "chosen", "rejected": P token lists}."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # PaliGemma's processor takes the answer as a suffix, gives it token type 1, and makes labels of that type's
        # tokens. Tokens of type 0 attend to both sides, so answers must have type 1.
        takes_suffix = {"token_type_ids", "labels"} <= set(processor.model_input_names)
        self.answer_types = {"token_type_ids": 1} if takes_suffix else {}
        for name in ("eos_token_id", "pad_token_id"):
            require(getattr(self.tokenizer, name) is not None, "processor", f"tokenizer.{name}", "a token id", None)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "prompts": self.prompts(rows),
            "rows": [row.id for row in rows],
            "chosen": [self.answer_tokens(row, row.chosen) for row in rows],
            "rejected": [self.answer_tokens(row, row.rejected) for row in rows],
        }

    def prompts(self, rows: Sequence[Row], padding_side: str = "right") -> dict[str, Tensor]:
        """The processor's outputs for the rows' prompts. Generation needs `padding_side` "left"."""
        texts = [self.prompt_text(row) for row in rows]
        images = [row.load_images() for row in rows]
        # A chat template has already written the special tokens.
        chat = isinstance(rows[0].prompt, list)
        outputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            text_kwargs={"padding": True, "padding_side": padding_side, "add_special_tokens": not chat},
            return_tensors="pt",
        )
        return {name: value for name, value in outputs.items() if name != "labels"}  # PaliGemma's, for its suffix

    def join(self, prompts: dict[str, Tensor], *answers: Sequence[Tokens]) -> Batch:
        """Append answers to the outputs of `prompts`: see `with_answers`."""
        return with_answers(prompts, *answers, pad_id=self.tokenizer.pad_token_id, answer_types=self.answer_types)

    def answer_tokens(self, row: Row, answer: str | list[dict[str, Any]]) -> Tokens:
        """The tokens that the model should generate after the row's prompt, with the end-of-sequence token last.

        They are cut to the row's `max_answer`, if it is set; a cut answer has no end-of-sequence token. Raises
        `InputError` if the chat template does not render prompt and answer as the rendered prompt plus an answer.
        """
        if isinstance(row.prompt, list):
            answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            prompt, full = self.prompt_text(row), render(self.processor, row.where, row.prompt + answer)
            expected = f"prompt and answer to start with the rendered prompt {prompt!r}"
            require(full.startswith(prompt), row.where, "chat template", expected, repr(full))
            answer = full[len(prompt) :].rstrip()
        tokens = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        ended = tokens if tokens and tokens[-1] == eos else [*tokens, eos]
        return ended[: row.max_answer]

    def prompt_text(self, row: Row) -> str:
        """The prompt as text: a text prompt as it is, messages as the chat template renders them."""
        if isinstance(row.prompt, str):
            return row.prompt
        return render(self.processor, row.where, row.prompt, add_generation_prompt=True)


def with_answers(
    prompts: dict[str, Tensor],
    *answers: Sequence[Tokens],
    pad_id: int,
    answer_types: Mapping[str, int] = MappingProxyType({}),
) -> Batch:
    """Append answers to P prompts. k lists of P answers give a batch of k P sequences, list after list.

    Padding is removed from the prompts, and sequences are padded on the right with `pad_id`. Other outputs with the
    shape of `input_ids` (masks, token types) are extended over the answers: by 1 in the attention mask, by
    `answer_types[name]` or else 0 in the others. All remaining outputs (pixel_values, image_grid_thw, ...) are
    repeated k times. Labels are the answers' tokens, and `IGNORE_INDEX` everywhere else.
    """
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    rows = [(row, tokens) for group in answers for row, tokens in enumerate(group)]
    lengths = mask.sum(dim=1).tolist()
    width = max(lengths[row] + len(tokens) for row, tokens in rows)
    labels = ids.new_full((len(rows), width), IGNORE_INDEX)
    inputs: dict[str, Tensor] = {}
    for key, value in prompts.items():
        if value.shape != ids.shape:
            inputs[key] = value.repeat(len(answers), *(1,) * (value.dim() - 1))
            continue
        inputs[key] = value.new_full((len(rows), width), pad_id if key == "input_ids" else 0)
        for index, (row, _) in enumerate(rows):
            inputs[key][index, : lengths[row]] = value[row, mask[row]]
    for index, (row, tokens) in enumerate(rows):
        span = slice(lengths[row], lengths[row] + len(tokens))
        inputs["input_ids"][index, span] = labels[index, span] = ids.new_tensor(tokens)
        for key, mark in {"attention_mask": 1, **answer_types}.items():
            inputs[key][index, span] = mark
    return Batch(inputs, shift_labels(labels))


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`inputs` with their tensors moved to `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
