"""Answers drawn by a server of chat completions with images: vLLM, SGLang, or another that speaks OpenAI's protocol.

A server has weights of its own and answers with those, however far training has come; nothing here sends it new ones.
It stands for the policy while the two are close: serve the model that stage 2 starts from, or what a checkpoint saved.
How it draws is its own affair, so a run that is repeated may get other answers; one that is resumed keeps those that
it had, which are part of a checkpoint.
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
from cwdpo_trainer.errors import describe, require, shorten

WHERE = "sampling.server"
PAUSES = (1.0, 5.0, 20.0)  # seconds before another attempt, where a server is away or busy
TIMEOUT = 600.0  # seconds for an answer
REQUESTS = 16  # at a time: a server batches them


@dataclass(frozen=True)
class AnswerServer:
    """The server at `url` (without /v1), asked for the model `model`."""

    url: str
    model: str

    @classmethod
    def open(cls, url: str, rows: Sequence[Row]) -> AnswerServer:
        """The server at `url` and the first of its models, if it answers and can be asked about all `rows`.

        Raises `InputError` if not.
        """
        for row in rows:
            _check(row)
        models = _request(f"{url}/v1/models", None).get("data", [])
        require(bool(models), WHERE, url, "at least 1 model", 0)
        return cls(url, models[0]["id"])

    def draw(
        self, collator: PairCollator, rows: Sequence[Row], settings: SamplingArguments, seed: int
    ) -> list[list[Tokens]]:
        """For each row `settings.samples` answers, as tokens. Raises `InputError` where the server fails to answer."""

        def ask(place: int) -> list[Tokens]:
            body = {
                "model": self.model, "messages": chat_messages(rows[place]), "n": settings.samples,
                "seed": (seed + place) % 2**31, "temperature": settings.temperature, "top_p": settings.top_p,
                "max_tokens": settings.max_new_tokens,
            }  # fmt: skip
            choices = _request(f"{self.url}/v1/chat/completions", body)["choices"]
            texts = [choice["message"]["content"] or "" for choice in choices]
            # Of an answer that was cut off, the end-of-sequence token is what is over.
            return [collator.answer_tokens(rows[place], text)[: settings.max_new_tokens] for text in texts]

        with ThreadPoolExecutor(REQUESTS) as threads:
            return list(threads.map(ask, range(len(rows))))


def chat_messages(row: Row) -> list[dict[str, Any]]:
    """A row's prompt with its images in their places, as data URIs."""
    uris = (_data_uri(image) for image in row.load_images())

    def part(value: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(uris)}} if value["type"] == "image" else value

    return [
        {**message, "content": [part(value) for value in content] if isinstance(content, list) else content}
        for message in row.prompt
        for content in [message["content"]]
    ]


def _check(row: Row) -> None:
    is_chat = isinstance(row.prompt, list)
    require(is_chat, row.where, "prompt", f"a list of messages, as {WHERE} is set", "text")
    contents = [message["content"] for message in row.prompt if isinstance(message["content"], list)]
    places = sum(part["type"] == "image" for content in contents for part in content)
    expected = f"one image part per image, as {WHERE} is set"
    require(places == len(row.images), row.where, "prompt", expected, f"{places} for {len(row.images)} images")


def _data_uri(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _request(url: str, body: dict[str, Any] | None, pauses: Sequence[float] = PAUSES) -> dict[str, Any]:
    """The server's answer; one that is away or busy is asked again after each of `pauses`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        problem = shorten(f"{error.code} {error.read(500).decode(errors='replace')}")
        passes = error.code >= 500 or error.code == 429
    except (OSError, ValueError) as error:  # no connection, no answer in time, no JSON
        problem, passes = describe(error), True
    require(passes and bool(pauses), WHERE, url, "an answer", problem)
    time.sleep(pauses[0])
    return _request(url, body, pauses[1:])
