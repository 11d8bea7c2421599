"""Preference rows from files or data sets (sources.py), checked one by one before a run writes anything.

A row has the columns

    prompt     text with the model's image placeholder, or a list of chat messages
    chosen     the good answer: text, or a list of one assistant message
    rejected   the bad answer, likewise
    images     list of paths, relative to the file, or `data:` URIs (or `image`: one of them); may be absent.
               A data set of the `datasets` library has the images themselves, or their bytes
    references optional list of texts that count as right answers (default: the chosen one)
    negative_source  optional name of where the rejected answer is from; the probes group by it

or those of another project's layout, see layouts.py. Text is used as it stands: between prompt and answer
nothing is added but the end-of-sequence token after it. All rows are read before the bad ones are reported.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cwdpo_trainer.data.images import IMAGE_ERRORS, ImageRef, image_refs, unreadable
from cwdpo_trainer.data.layouts import canonical
from cwdpo_trainer.data.source import Source
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError, InputErrors, require, shorten

SHOWN = 10  # bad rows that a report quotes
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One preference pair; `id` is its place among the good ones, `where` is "file:line" or "data set[place]"."""

    id: int
    where: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    images: tuple[ImageRef, ...]
    references: tuple[str, ...]
    negative_source: str
    # Set by lengths.py where the row is too long: pixels an image may have, tokens an answer may have.
    max_pixels: int | None = None
    max_answer: int | None = None

    def load_images(self) -> list[Image.Image]:
        """The pictures, read now: rows stay small until a batch needs them."""
        loaded = []
        for picture in self.images:
            try:
                loaded.append(_within(picture.load(), self.max_pixels))
            except IMAGE_ERRORS as error:
                raise unreadable(self.where, picture, error) from error
        return loaded


def _within(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image, made smaller where it has more than `max_pixels`; its proportions stay."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def load_rows(data: Source | Path, skipped: Callable[[str], None] | None = None) -> list[Row]:
    """Every row of a data set, or of the file at a path.

    Raises an `InputError` about the bad row, `InputErrors` about several. With `skipped` the good rows are returned
    instead, if there are any, and `skipped` is called with the report about the bad ones.
    """
    source = open_source(data) if isinstance(data, Path) else data
    rows, errors = read_rows(source)
    if errors:
        title = f"{source.name}: {len(errors)} of {len(rows) + len(errors)} rows are invalid"
        if skipped is not None and rows:
            skipped(str(InputErrors(f"{title} and are skipped", errors, SHOWN)))
        else:
            raise errors[0] if len(errors) == 1 else InputErrors(title, errors, SHOWN)
    require(bool(rows), source.name, "", "at least 1 row", 0)
    return rows


def read_rows(source: Source) -> tuple[list[Row], list[InputError]]:
    """Return the good rows and an error for each bad one. Raises `InputError` if the source cannot be read at all."""
    rows: list[Row] = []
    errors: list[InputError] = []
    for where, values in source.rows():
        try:
            row = _row(len(rows), where, values, source.folder)
            if rows:  # one batch is rendered one way
                first, kind = (_kind(each.prompt) for each in (rows[0], row))
                require(kind == first, where, "prompt", f"{first}, as in {rows[0].where}", kind)
            rows.append(row)
        except InputError as error:
            errors.append(error)
    return rows, errors


def _kind(prompt: str | list[Message]) -> str:
    return "text" if isinstance(prompt, str) else "a list of messages"


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded shuffle of `rows`, cut after `fraction` of them: the rows of stage 1 and those of stage 2."""
    require(len(rows) >= 2, "config", "data.train", "at least 2 rows, as two stages share them", len(rows))
    order = list(rows)
    random.Random(seed).shuffle(order)
    cut = min(max(round(fraction * len(order)), 1), len(order) - 1)
    return order[:cut], order[cut:]


def distinct_prompts(rows: Sequence[Row]) -> list[Row]:
    """The first row of each (prompt, images): the scenes to caption, whatever number of pairs they are in."""
    seen: dict[tuple[str, tuple[ImageRef, ...]], Row] = {}
    for row in rows:
        seen.setdefault((json.dumps(row.prompt), row.images), row)
    return list(seen.values())


def _row(row_id: int, where: str, values: Any, folder: Path) -> Row:
    if isinstance(values, InputError):
        raise values
    require(isinstance(values, dict), where, "", "a JSON object", type(values).__name__)
    values = canonical(where, values)
    prompt = _content(where, values, "prompt")
    chosen, rejected = (_content(where, values, name) for name in ("chosen", "rejected"))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, list):
            ok = isinstance(prompt, list) and len(answer) == 1 and answer[0]["role"] == "assistant"
            expected = "text, or one assistant message after a prompt of messages"
            require(ok, where, name, expected, shorten(repr(answer)))
    require(chosen != rejected, where, "rejected", "an answer that differs from chosen", shorten(repr(rejected)))
    references = values.get("references", [answer_text(chosen)])
    texts = isinstance(references, list) and all(isinstance(text, str) and text.strip() for text in references)
    require(texts and bool(references), where, "references", "a non-empty list of texts", shorten(repr(references)))
    source = values.get("negative_source", "dataset")
    named = isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9_]+", source) is not None
    named = named and source not in ("chosen", "onpolicy")  # names of the other sets that are probed
    expected = "letters, digits and underscores, other than 'chosen' and 'onpolicy'"
    require(named, where, "negative_source", expected, repr(source))
    images = image_refs(where, values, folder)
    return Row(row_id, where, prompt, chosen, rejected, images, tuple(references), source)


def answer_text(answer: str | list[Message]) -> str:
    """An answer as plain text: the text itself, or the text parts of its message."""
    if isinstance(answer, str):
        return answer
    content = answer[0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _content(where: str, values: dict[str, Any], name: str) -> str | list[Message]:
    require(name in values, where, name, "a value", "none")
    value = values[name]
    if isinstance(value, str):
        require(bool(value.strip()), where, name, "at least 1 word", repr(value))
        return value
    messages = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and _is_message_content(message)
        for message in value
    )
    require(messages, where, name, "text or a list of messages with role and content", type(value).__name__)
    require(bool(value), where, name, "at least 1 message", 0)
    return value


def _is_message_content(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    )
