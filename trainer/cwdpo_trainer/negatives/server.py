"""Negatives sampled by an inference server: vLLM, SGLang, or another with OpenAI's chat completions API and images.

The server samples from its own weights. Training does not update them, so its answers become less on-policy as
training goes on. Serve the model that stage 2 starts from, or a checkpoint of it.

Servers need not honor seeds, so two runs may get different answers. A resumed run keeps the answers of its checkpoint.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image

from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import PairCollator, Tokens
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError, require, shorten, surrogate_in
from cwdpo_trainer.negatives.http_json import Call, exchange

WHERE = "sampling.server"
LARGEST_REPLY = 4_000_000  # bytes, beside the answers
TOKEN_CHARACTERS = 256  # at most; the longest tokens of known vocabularies are 128 spaces
CHARACTER_BYTES = 12  # at most, in JSON
# What a message may have instead of content. Then the model did not answer with a text.
FINISHED = ("stop", "length", "eos_token", "stop_sequence")  # finish reasons of the servers in use
OTHER_CONTENT = ("reasoning_content", "reasoning", "tool_calls", "refusal")


@dataclass(frozen=True)
class AnswerServer:
    """The server at `url` (without /v1), and the name of the model to request from it."""

    url: str
    model: str

    @classmethod
    def open(cls, url: str, rows: Sequence[Row]) -> AnswerServer:
        """Connect to the server at `url` and choose the first of its models.

        Raises `InputError` if the server does not answer, or if a row's prompt cannot be sent to it.
        """
        for row in rows:
            _check(row)
        (model,) = exchange(WHERE, [Call(f"{url}/v1/models", LARGEST_REPLY)], _first_model)
        return cls(url, model)

    def draw(
        self, collator: PairCollator, rows: Sequence[Row], settings: SamplingArguments, seed: int
    ) -> list[list[Tokens]]:
        """`settings.samples` answers to each row, as tokens. Raises `InputError` if the server fails to answer."""
        limit = settings.max_new_tokens

        def body(index: int) -> dict[str, Any]:
            return {
                "model": self.model, "messages": chat_messages(rows[index]), "n": settings.samples,
                "seed": (seed + index) % 2**31, "temperature": settings.temperature, "top_p": settings.top_p,
                "max_tokens": limit,
            }  # fmt: skip

        url = f"{self.url}/v1/chat/completions"
        largest = LARGEST_REPLY + settings.samples * limit * TOKEN_CHARACTERS * CHARACTER_BYTES
        calls = [Call(url, largest, partial(body, index)) for index in range(len(rows))]
        drawn = exchange(WHERE, calls, partial(_answers, count=settings.samples, longest=limit * TOKEN_CHARACTERS))
        # An answer that reached the limit has no end-of-sequence token: the slice removes the one added here.
        return [
            [tokens[:limit] for tokens in collator.answer_tokens(row, *texts)]
            for row, texts in zip(rows, drawn, strict=True)
        ]


def _first_model(call: Call, reply: Any) -> str:
    models = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(models, list):
        raise InputError(WHERE, call.url, "a JSON object with a list of models, `data`", _shape(reply))
    require(bool(models), WHERE, call.url, "at least 1 model", 0)
    name = models[0].get("id") if isinstance(models[0], dict) else None
    if not (isinstance(name, str) and name):
        raise InputError(WHERE, call.url, "a model with a name, `id`", _shape(models[0]))
    return name


def _answers(call: Call, reply: Any, count: int, longest: int) -> list[str]:
    """The texts of a chat completion with `count` choices of at most `longest` characters."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list):
        raise InputError(WHERE, call.url, "a JSON object with a list of answers, `choices`", _shape(reply))
    expected = f"{count} choices, as sampling.samples asks for"
    require(len(choices) == count, WHERE, call.url, expected, len(choices))
    return [_answer(call, choice, longest) for choice in choices]


def _answer(call: Call, choice: Any, longest: int) -> str:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise InputError(WHERE, call.url, "choices with an object `message`", _shape(choice))
    reason = choice.get("finish_reason")
    finished = reason is None or reason in FINISHED
    require(finished, WHERE, call.url, f"finished answers (finish_reason {' or '.join(FINISHED)})", _shape(reason))
    text = message.get("content")
    if text is None and not any(message.get(key) for key in OTHER_CONTENT):
        text = ""  # some servers send null for an empty answer
    if not isinstance(text, str):
        expected = "a message whose `content` is text (turn off tools and reasoning parsers)"
        raise InputError(WHERE, call.url, expected, f"{_shape(message)}, with content {_shape(text)}")
    expected = f"answers of at most {longest} characters, as sampling.max_new_tokens limits them"
    require(len(text) <= longest, WHERE, call.url, expected, len(text))
    require(
        surrogate_in(text) is None,
        WHERE,
        call.url,
        "answers in Unicode",
        f"a lone surrogate in {shorten(repr(text), 80)}",
    )
    return text


def _shape(value: Any) -> str:
    """A JSON value in a few words. It may be deep and large, so it is not printed."""
    if isinstance(value, dict):
        return f"an object with {shorten(', '.join(value), 100) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return {str: "text", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def chat_messages(row: Row) -> list[dict[str, Any]]:
    """A row's prompt with each image placeholder replaced by its image, as a data URI."""
    uris = (_data_uri(image) for image in row.load_images())

    def part(value: dict[str, Any]) -> dict[str, Any]:
        if value["type"] == "image":
            return {"type": "image_url", "image_url": {"url": next(uris)}}
        return {"type": "text", "text": value["text"]}  # nothing else that the part may have

    return [
        {**message, "content": [part(value) for value in content] if isinstance(content, list) else content}
        for message in _messages(row)
        for content in [message["content"]]
    ]


def _messages(row: Row) -> list[dict[str, Any]]:
    if isinstance(row.prompt, str):
        raise InputError(row.where, "prompt", f"a list of messages, as {WHERE} is set", "text")
    return row.prompt


def _check(row: Row) -> None:
    """Raise `InputError` unless the prompt is chat messages with texts and one image part per image.

    A part of another type, such as `image_url`, could make the server fetch what the row names.
    """
    contents = [message["content"] for message in _messages(row) if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content]
    for part in parts:
        is_text = part["type"] == "text" and isinstance(part.get("text"), str)
        known = is_text or part["type"] == "image"
        expected = f"parts of type text or image, as {WHERE} is set"
        require(known, row.where, "prompt", expected, f"one of type {shorten(repr(part['type']), 40)}")
    images = sum(part["type"] == "image" for part in parts)
    expected = f"one image part per image, as {WHERE} is set"
    require(images == len(row.images), row.where, "prompt", expected, f"{images} for {len(row.images)} images")


def _data_uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
