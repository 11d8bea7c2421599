"""Batches have labels on the answers' tokens alone, and all outputs of the processor."""

from __future__ import annotations

import copy

import pytest
import torch

from cwdpo_trainer.data.collator import PairCollator, with_answers
from cwdpo_trainer.errors import InputError

TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def test_answers_end_with_eos(collator, rows):
    pairs = collator(rows[:2])
    assert pairs["rows"] == [0, 1]
    words = [collator.tokenizer.convert_ids_to_tokens(tokens) for tokens in pairs["chosen"]]
    assert words == [["a", "red", "square", "</s>"], ["a", "green", "square", "</s>"]]


def test_labels_are_aligned_with_the_states_that_predict_them(collator, rows):
    pairs = collator(rows[:2])
    inputs, labels = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    ids, length = inputs["input_ids"], pairs["prompts"]["input_ids"].shape[1]
    for row, answer in enumerate(pairs["chosen"] + pairs["rejected"]):
        end = length + len(answer)
        assert ids[row, :length].tolist() == pairs["prompts"]["input_ids"][row % 2].tolist()
        assert ids[row, length:end].tolist() == answer
        assert inputs["attention_mask"][row].tolist() == [1] * end + [0] * (ids.shape[1] - end)
        expected = [-100] * (length - 1) + answer + [-100] * (ids.shape[1] - end + 1)
        assert labels[row].tolist() == expected


def test_prompt_padding_is_removed_from_either_side():
    ids = torch.tensor([[7, 8, 9], [0, 0, 5]])
    prompts = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": (ids > 0).long()}
    inputs, labels = with_answers(prompts, [[1], [2, 3]], pad_id=4)
    assert inputs["input_ids"].tolist() == [[7, 8, 9, 1], [5, 2, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert inputs["token_type_ids"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, 1, -100], [2, 3, -100, -100]]


def test_other_outputs_are_repeated_in_row_order(collator, rows):
    pairs = collator(rows[:2])
    pairs["prompts"]["image_grid_thw"] = torch.tensor([[1, 2, 3], [4, 5, 6]])
    inputs, _ = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    pixels = pairs["prompts"]["pixel_values"]
    assert torch.equal(inputs["pixel_values"], torch.cat([pixels, pixels]))
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 3], [4, 5, 6]] * 2


def test_an_answer_without_tokens_has_no_label():
    ids = torch.tensor([[7, 8]])
    _, labels = with_answers({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [[]], pad_id=0)
    assert (labels == -100).all()


def test_messages_are_rendered_by_the_chat_template(collator, rows):
    processor = copy.deepcopy(collator.processor)
    processor.chat_template = TEMPLATE
    chat = PairCollator(processor)
    row = copy.copy(rows[0])
    object.__setattr__(row, "prompt", [{"role": "user", "content": "<image> describe"}])
    pairs = chat([row])
    tokenizer = collator.tokenizer
    # "user" and "assistant" are not in the vocabulary. <image> becomes four tokens.
    expected = ["<s>", "<unk>", *["<image>"] * 4, "describe", "</s>", "<s>", "<unk>"]
    assert tokenizer.convert_ids_to_tokens(pairs["prompts"]["input_ids"][0]) == expected
    assert tokenizer.convert_ids_to_tokens(pairs["chosen"][0]) == ["a", "red", "square", "</s>"]


def test_a_chat_template_that_rewrites_the_prompt_is_refused(collator, rows):
    processor = copy.deepcopy(collator.processor)
    processor.chat_template = "{{ messages | length }}"
    row = copy.copy(rows[0])
    object.__setattr__(row, "prompt", [{"role": "user", "content": "describe"}])
    with pytest.raises(
        InputError, match=r"train.jsonl:1: chat template: expected prompt and answer to start with the rendered prompt"
    ):
        PairCollator(processor).answer_tokens(row, "a")
