"""Rows in the layouts of other projects, converted to the columns prompt, chosen, rejected and images.

The columns of a row determine its layout:

    messages + rejected_response   ms-swift: the last message is the chosen answer
    messages + rejected_messages   ms-swift: two conversations that differ in their last message
    conversations or messages, + chosen + rejected   LLaMA-Factory's ShareGPT: {"from": ..., "value": ...} or
                                   {"role": ..., "content": ...}; `system` is optional
    instruction + chosen + rejected   LLaMA-Factory's alpaca: `input`, `system` and `history` are optional
    prompt + chosen + rejected     TRL: text or messages
    chosen + rejected              TRL without a prompt: the common start of both answers is the prompt

A null column counts as absent, but a null prompt is an error: the prompt of another layout is none for this one. If
messages of plain text come with images, each tag `<image>` becomes an image part of
its message. Without any tag, the images go before the text of the first user message. Text with a model's own
placeholder (`<|image_pad|>`, `[IMG]`, ...) is used as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cwdpo_trainer.errors import InputError, require, shorten

Values = dict[str, Any]
Message = dict[str, Any]

COLUMNS = ("prompt", "chosen", "rejected", "images", "image", "references", "negative_source")
# A row of any layout may also have these columns. `METADATA` is accepted and ignored.
SHARED = frozenset({"images", "image", "references", "negative_source"})
METADATA = frozenset({"id", "prompt_id", "score_chosen", "score_rejected", "margin", "source"})
# Every column that some layout uses.
ALL_COLUMNS = SHARED | {
    "prompt", "chosen", "rejected", "messages", "rejected_response", "rejected_messages", "rejected_images",
    "conversations", "system", "instruction", "input", "history",
}  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
TAG = "<image>"
PLACEHOLDER = re.compile(r"<[^<>\s]*(?:image|IMG)[^<>\s]*>|\[IMG\]")


def canonical(where: str, values: Values) -> Values:
    """Convert a row of any layout to `COLUMNS`. Raises `InputError` if the row has no known layout or breaks its
    rules."""
    null_prompt = "prompt" in values and values["prompt"] is None
    values = {name: value for name, value in values.items() if value is not None}
    convert, own = _layout(where, values)
    require(not (null_prompt and convert is _implicit), where, "prompt", "a value", "null")
    unknown = [_column(name) for name in sorted(set(values) - set(own) - SHARED - METADATA)]
    names = ", ".join([*own, *(name for name in COLUMNS if name in SHARED)])
    columns = "columns" if len(unknown) > 1 else "column"
    require(not unknown, where, "", "", f"unknown {columns} {', '.join(unknown)} (known: {names})")
    row = {name: value for name, value in values.items() if name in SHARED}
    row |= convert(where, values)
    if "images" in row and isinstance(row["images"], list):
        row["images"] = [_image_path(image) for image in row["images"]]
    if "image" in row:
        row["image"] = _image_path(row["image"])
    return _with_image_parts(where, row)


def _column(name: str) -> str:
    """A column's name for a message, in quotes if it could be misread."""
    return name if name.isidentifier() else shorten(repr(name), 80)


def _layout(where: str, values: Values) -> tuple[Callable[[str, Values], Values], tuple[str, ...]]:
    """The function that converts the row, and the columns of its layout."""
    if "prompt" in values:
        same = values.get("messages") == values.get("chosen")  # some datasets repeat the chosen conversation
        return _preference, ("prompt", "chosen", "rejected", *(("messages",) if same else ()))
    if "messages" in values and ("rejected_response" in values or "rejected_messages" in values):
        return _swift, ("messages", "rejected_response", "rejected_messages", "rejected_images", "system")
    answers = "chosen" in values and "rejected" in values
    if "messages" in values and answers:
        return _sharegpt, ("messages", "chosen", "rejected", "system")
    if "conversations" in values and answers:
        return _sharegpt, ("conversations", "chosen", "rejected", "system")
    if "instruction" in values and answers:
        return _alpaca, ("instruction", "input", "chosen", "rejected", "system", "history")
    if answers:
        return _implicit, ("chosen", "rejected")
    expected = (
        "prompt, chosen, rejected (TRL), or messages, rejected_response (ms-swift), or chosen, rejected and either "
        "conversations or instruction (LLaMA-Factory)"
    )
    columns = ", ".join(sorted(values)) or "none"
    raise InputError(where, "columns", expected, columns)


def _preference(where: str, values: Values) -> Values:
    """TRL. A text prompt next to two conversations repeats their common start, so it is ignored."""
    row: Values = {name: values[name] for name in ("prompt", "chosen", "rejected") if name in values}
    conversations = all(_is_conversation(row.get(name)) for name in ("chosen", "rejected"))
    return _implicit(where, row) if conversations and isinstance(row["prompt"], str) else row


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _implicit(where: str, values: Values) -> Values:
    """The prompt is the longest common start of both answers. In texts it ends before a space, which belongs to the
    answers as tokenizers expect."""
    chosen, rejected = values["chosen"], values["rejected"]
    alike = type(chosen) is type(rejected) and isinstance(chosen, (str, list))
    kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
    require(alike, where, "chosen and rejected", "two texts or two lists of messages", kinds)
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    length = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
    if isinstance(chosen, str):
        length = max((match.start() for match in re.finditer(r"\s+", chosen[:length])), default=0)
    else:
        length = min(length, shorter - 1)
    require(length > 0, where, "prompt", "a value, or a common start of chosen and rejected", "neither")
    return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _swift(where: str, values: Values) -> Values:
    messages = _conversation(where, "messages", values["messages"], values.get("system"))
    if "rejected_messages" in values:
        one = "rejected_response" not in values
        require(one, where, "columns", "either rejected_response or rejected_messages", "both")
        same = values.get("rejected_images", values.get("images")) == values.get("images")
        got = shorten(repr(values.get("rejected_images")))
        require(same, where, "rejected_images", "the same value as images", got)
        rejected = _conversation(where, "rejected_messages", values["rejected_messages"], values.get("system"))
        return _implicit(where, {"chosen": messages, "rejected": rejected})
    role = messages[-1]["role"]
    require(role == "assistant", where, "messages", "a last message with role 'assistant'", f"role {role!r}")
    require(len(messages) > 1, where, "messages", "at least 2 (a prompt and its answer)", len(messages))
    rejected = values["rejected_response"]
    require(isinstance(rejected, str), where, "rejected_response", "text", type(rejected).__name__)
    return {"prompt": messages[:-1], "chosen": _answer(messages[-1]), "rejected": rejected}


def _sharegpt(where: str, values: Values) -> Values:
    name = "messages" if "messages" in values else "conversations"
    prompt = _conversation(where, name, values[name], values.get("system"))
    role = prompt[-1]["role"]
    expected = "a last message from the user (the answers follow it)"
    require(role != "assistant", where, name, expected, f"role {role!r}")
    answers = {}
    for column in ("chosen", "rejected"):
        answer = values[column]
        if not isinstance(answer, str):
            (message,) = _conversation(where, column, [answer], None)
            role = message["role"]
            require(role == "assistant", where, column, "a message with role 'assistant' or 'gpt'", f"role {role!r}")
            answer = _answer(message)
        answers[column] = answer
    return {"prompt": prompt, **answers}


def _alpaca(where: str, values: Values) -> Values:
    asked = [values["instruction"], values.get("input", "")]
    texts = all(isinstance(text, str) for text in asked) and bool(asked[0].strip())
    expected = "texts, and an instruction that is not empty"
    require(texts, where, "instruction and input", expected, shorten(repr(asked)))
    turns = values.get("history", [])
    pairs = isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    require(pairs, where, "history", "a list of [question, answer] pairs", shorten(repr(turns)))
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "\n".join(text for text in asked if text)})
    prompt = _conversation(where, "history", messages, values.get("system"))
    return {"prompt": prompt, "chosen": values["chosen"], "rejected": values["rejected"]}


def _conversation(where: str, name: str, value: Any, system: Any) -> list[Message]:
    """Messages of either form as {"role", "content"}, after a message with the text `system` if there is one."""
    ok = isinstance(value, list) and bool(value)
    require(ok, where, name, "a non-empty list of messages", shorten(repr(value)))
    messages = []
    for message in value:
        fields = message if isinstance(message, dict) else {}
        role: Any = fields.get("role", fields.get("from"))
        content = fields.get("content", fields.get("value"))
        ok = isinstance(role, str) and isinstance(content, (str, list))
        expected = "messages with role and content, or with from and value"
        require(ok, where, name, expected, shorten(repr(message)))
        role = ROLES.get(role, role)
        known = ("system", "user", "assistant", "tool")
        require(role in known, where, name, "roles out of " + ", ".join([*known, *ROLES]), shorten(repr(role)))
        messages.append({"role": role, "content": content})
    if system:
        require(isinstance(system, str), where, "system", "text", type(system).__name__)
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _answer(message: Message) -> str | list[Message]:
    """The text of an answer; the whole message if its content has parts."""
    return message["content"] if isinstance(message["content"], str) else [message]


def _image_path(image: Any) -> Any:
    """The path of an image written as {"path": ...}, as the `datasets` library does."""
    return image["path"] if isinstance(image, dict) and isinstance(image.get("path"), str) else image


def _with_image_parts(where: str, row: Values) -> Values:
    """Turn the row's images into parts of the prompt's messages, if all of these are plain text."""
    prompt = row.get("prompt")
    images = [row["image"]] if "image" in row else row.get("images")
    if not images or not prompt or not isinstance(images, list) or not isinstance(prompt, list):
        return row
    contents: list[Any] = [message.get("content") if isinstance(message, dict) else None for message in prompt]
    if not all(isinstance(content, str) for content in contents):
        return row
    found = [tag for content in contents for tag in PLACEHOLDER.findall(content)]
    if any(tag != TAG for tag in found):
        return row
    ok = len(found) in (0, len(images))
    require(ok, where, "prompt", "one <image> tag per image, or none", f"{len(found)} for {len(images)} images")
    messages = [{**message, "content": _parts(message["content"])} for message in prompt]
    if not found:
        first = next((message for message in messages if message.get("role") == "user"), messages[0])
        first["content"] = [{"type": "image"} for _ in images] + first["content"]
    # Chat templates that iterate over parts drop plain text, so the answers get parts too.
    answers: Values = {name: _answer_parts(row[name]) for name in ("chosen", "rejected") if name in row}
    return {**row, "prompt": messages, **answers}


def _parts(text: str) -> list[Message]:
    """`text` as message parts, with an image part for each tag."""
    parts: list[Message] = []
    for index, piece in enumerate(text.split(TAG)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _answer_parts(answer: Any) -> Any:
    """An answer with its text as a message part. Other values are returned unchanged, for the checks in rows.py."""
    if isinstance(answer, str) and answer.strip():
        return [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    if isinstance(answer, list):
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message, dict) and isinstance(message.get("content"), str)
            else message
            for message in answer
        ]
    return answer
