"""Rows in other projects' layouts are converted to the trainer's columns, with their images."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.layouts import canonical
from cwdpo_trainer.data.rows import load_rows
from cwdpo_trainer.errors import InputError

ASK = {"role": "user", "content": "where"}
SYSTEM = {"role": "system", "content": "be brief"}
QUESTION, GOOD, BAD = (
    {"from": "human", "value": "where"},
    {"from": "gpt", "value": "left"},
    {"from": "gpt", "value": "up"},
)
# Like chat templates of vision-language models: iterates over message parts and drops plain text.
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m.role + ' ' }}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<image> ' }}{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{{ ' </s> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


TEXT_LAYOUTS = {
    "trl": {"prompt": [ASK], "chosen": [reply("left")], "rejected": [reply("up")]},
    "trl, implicit": {"chosen": [ASK, reply("left")], "rejected": [ASK, reply("up")]},
    "trl, prompt repeated": {"prompt": "where", "chosen": [ASK, reply("left")], "rejected": [ASK, reply("up")]},
    "swift": {"messages": [ASK, reply("left")], "rejected_response": "up"},
    "swift, messages": {"messages": [ASK, reply("left")], "rejected_messages": [ASK, reply("up")]},
    "sharegpt": {"conversations": [QUESTION], "chosen": GOOD, "rejected": BAD},
    "sharegpt, openai": {"messages": [ASK], "chosen": reply("left"), "rejected": reply("up")},
    "alpaca": {"instruction": "where", "input": "", "chosen": "left", "rejected": "up"},
}


def text_of(answer: object) -> object:
    return answer[0]["content"] if isinstance(answer, list) else answer


@pytest.mark.parametrize("values", TEXT_LAYOUTS.values(), ids=TEXT_LAYOUTS)
def test_every_layout_gives_the_same_pair(values):
    row = canonical("f:1", {**values, "references": ["left"], "score_chosen": 9.0, "videos": None})
    assert (row["prompt"], row["references"]) == ([ASK], ["left"])
    assert (text_of(row["chosen"]), text_of(row["rejected"])) == ("left", "up")
    assert set(row) == {"prompt", "chosen", "rejected", "references"}


@pytest.mark.parametrize("values", TEXT_LAYOUTS.values(), ids=TEXT_LAYOUTS)
def test_every_layout_loads_with_an_image_and_is_tokenized(tmp_path, collator, values):
    """The rows have no image tag, so the image goes before the question."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "one.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({**values, "images": ["photos/one.png"]}))
    rows = load_rows(tmp_path / "a.jsonl")
    assert [image.name for image in rows[0].images] == [str(tmp_path / "photos" / "one.png")]
    processor = copy.deepcopy(collator.processor)
    processor.chat_template = TEMPLATE
    pairs = PairCollator(processor)(rows)
    tokens = processor.tokenizer.convert_ids_to_tokens(pairs["prompts"]["input_ids"][0])
    assert tokens == ["<s>", "<unk>", *["<image>"] * 4, "<unk>", "</s>", "<s>", "<unk>"]
    assert processor.tokenizer.convert_ids_to_tokens(pairs["chosen"][0]) == ["left", "</s>"]
    assert len(pairs["rejected"][0]) == 2


@pytest.mark.parametrize("images", [{"images": ["a", "b"]}, {"images": [{"path": "a", "bytes": None}, {"path": "b"}]}])
def test_image_tags_become_image_parts(images):
    asked = {"from": "human", "value": "<image>\nand <image> differ?"}
    row = canonical("f:1", {"conversations": [asked], "chosen": GOOD, "rejected": BAD, "system": "be brief", **images})
    parts = [
        {"type": "image"},
        {"type": "text", "text": "\nand "},
        {"type": "image"},
        {"type": "text", "text": " differ?"},
    ]
    assert row["prompt"] == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": parts},
    ]
    assert row["images"] == ["a", "b"]


@pytest.mark.parametrize("content", ["<|image_pad|> x", "[IMG] x", "<start_of_image> x", [{"type": "image"}]])
def test_a_prompt_with_its_own_placeholder_is_unchanged(content):
    prompt = [{"role": "user", "content": content}]
    values = {"prompt": prompt, "chosen": "a", "rejected": "b", "image": "one.png"}
    assert canonical("f:1", values) == values


def test_text_prompts_are_unchanged():
    values = {"prompt": "<image> x", "chosen": "a", "rejected": "b", "images": ["one.png"]}
    assert canonical("f:1", values) == values


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("H: hi\n\nA: yes", "H: hi\n\nA: no", "H: hi\n\nA:"),
    ],
)
def test_an_implicit_prompt_of_text_ends_between_words(chosen, rejected, prompt):
    row = canonical("f:1", {"chosen": chosen, "rejected": rejected})
    assert row["prompt"] == prompt
    assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (chosen, rejected)


def test_alpaca_has_system_history_and_input():
    values = {"instruction": "where", "input": "the dog", "system": "be brief", "history": [["who", "me"]]}
    row = canonical("f:1", {**values, "chosen": "a", "rejected": "b"})
    asked = {"role": "user", "content": "where\nthe dog"}
    assert row["prompt"] == [SYSTEM, {"role": "user", "content": "who"}, reply("me"), asked]


SHARE, SWIFT = TEXT_LAYOUTS["sharegpt"], TEXT_LAYOUTS["swift"]
ALPACA = TEXT_LAYOUTS["alpaca"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "x", "answer": "y"}, "columns: expected prompt, chosen, rejected (TRL), or messages"),
        ({"question": "x", "answer": "y"}, "got answer, question"),
        ({}, "got none"),
        ({"messages": [ASK, reply("a")]}, "got messages"),
        (
            {"chosen": "a", "rejected": [reply("b")]},
            "chosen and rejected: expected two texts or two lists of messages, got str and list",
        ),
        ({"chosen": [reply("a")], "rejected": [reply("b")]}, "prompt: expected a value, or a common start"),
        ({"chosen": [], "rejected": []}, "prompt: expected a value, or a common start"),
        ({**SWIFT, "tools": "[]"}, "unknown column tools (known: messages, rejected_response, rejected_messages"),
        ({**SWIFT, "messages": [ASK]}, "messages: expected a last message with role 'assistant', got role 'user'"),
        ({**SWIFT, "messages": [reply("a")]}, "messages: expected at least 2"),
        ({**SWIFT, "messages": []}, "messages: expected a non-empty list of messages, got []"),
        ({**SWIFT, "messages": ["x"]}, "messages: expected messages with role and content, or with from and value"),
        ({**SWIFT, "rejected_response": 3}, "rejected_response: expected text, got int"),
        (
            {**SWIFT, "rejected_messages": [ASK]},
            "columns: expected either rejected_response or rejected_messages, got both",
        ),
        (
            {**TEXT_LAYOUTS["swift, messages"], "rejected_images": ["b"]},
            "rejected_images: expected the same value as images",
        ),
        ({**SHARE, "conversations": [QUESTION, GOOD]}, "conversations: expected a last message from the user"),
        (
            {**SHARE, "rejected": QUESTION},
            "rejected: expected a message with role 'assistant' or 'gpt', got role 'user'",
        ),
        ({**SHARE, "chosen": {"from": "function_call", "value": "f"}}, "chosen: expected roles out of system, user"),
        ({**SHARE, "system": 3}, "system: expected text, got int"),
        ({**ALPACA, "instruction": " "}, "instruction and input: expected texts, and an instruction that"),
        ({**ALPACA, "history": ["x"]}, "history: expected a list of [question, answer] pairs"),
        (
            {**ALPACA, "instruction": "<image> <image>", "images": ["a"]},
            "prompt: expected one <image> tag per image, or none, got 2 for 1 images",
        ),
    ],
)
def test_a_row_that_fits_no_layout_is_an_error(values, message):
    with pytest.raises(InputError) as error:
        canonical("f:1", values)
    assert error.value.where == "f:1"
    assert message in str(error.value)


def test_equal_conversations_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"chosen": [ASK, reply("a")], "rejected": [ASK, reply("a")]}))
    with pytest.raises(InputError, match=r"a.jsonl:1: rejected: expected an answer that differs from chosen"):
        load_rows(tmp_path / "a.jsonl")
