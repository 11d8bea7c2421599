"""Negatives sampled by an inference server: vLLM, SGLang, or another with OpenAI's chat completions API and images.

The server samples from its own weights. Training does not update them, so its answers become less on-policy as
training goes on. Serve the model that stage 2 starts from, or a checkpoint of it.

Servers need not honor seeds, so two runs may get different answers. A resumed run keeps the answers of its checkpoint.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import PairCollator, Tokens
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError, describe, require, shorten

WHERE = "sampling.server"
PAUSES = (1.0, 5.0, 20.0)  # seconds before each retry, if the server is unreachable or busy
TIMEOUT = 600.0  # seconds per request
REQUESTS = 16  # in parallel, so that the server can batch them


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
        models = _request(f"{url}/v1/models", None).get("data", [])
        require(bool(models), WHERE, url, "at least 1 model", 0)
        return cls(url, models[0]["id"])

    def draw(
        self, collator: PairCollator, rows: Sequence[Row], settings: SamplingArguments, seed: int
    ) -> list[list[Tokens]]:
        """`settings.samples` answers to each row, as tokens. Raises `InputError` if the server fails to answer."""

        def ask(index: int) -> list[Tokens]:
            body = {
                "model": self.model, "messages": chat_messages(rows[index]), "n": settings.samples,
                "seed": (seed + index) % 2**31, "temperature": settings.temperature, "top_p": settings.top_p,
                "max_tokens": settings.max_new_tokens,
            }  # fmt: skip
            choices = _request(f"{self.url}/v1/chat/completions", body)["choices"]
            texts = [choice["message"]["content"] or "" for choice in choices]
            # An answer that reached the limit has no end-of-sequence token: the slice removes the one added here.
            return [collator.answer_tokens(rows[index], text)[: settings.max_new_tokens] for text in texts]

        with ThreadPoolExecutor(REQUESTS) as threads:
            return list(threads.map(ask, range(len(rows))))


def chat_messages(row: Row) -> list[dict[str, Any]]:
    """A row's prompt with each image placeholder replaced by its image, as a data URI."""
    uris = (_data_uri(image) for image in row.load_images())

    def part(value: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(uris)}} if value["type"] == "image" else value

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
    """Raise `InputError` unless the prompt is chat messages with one image part per image."""
    contents = [message["content"] for message in _messages(row) if isinstance(message["content"], list)]
    parts = sum(part["type"] == "image" for content in contents for part in content)
    expected = f"one image part per image, as {WHERE} is set"
    require(parts == len(row.images), row.where, "prompt", expected, f"{parts} for {len(row.images)} images")


def _data_uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _request(url: str, body: dict[str, Any] | None, pauses: Sequence[float] = PAUSES) -> dict[str, Any]:
    """The server's response. If it is unreachable or busy, tries again after each of `pauses` (seconds)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        problem = shorten(f"{error.code} {error.read(500).decode(errors='replace')}")
        may_retry = error.code >= 500 or error.code == 429
    except (OSError, ValueError) as error:  # no connection, no answer in time, no JSON
        problem, may_retry = describe(error), True
    require(may_retry and bool(pauses), WHERE, url, "an answer", problem)
    time.sleep(pauses[0])
    return _request(url, body, pauses[1:])
