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

from cwdpo_trainer.data.images import BROKEN, Picture, pictures_of
from cwdpo_trainer.data.layouts import canonical
from cwdpo_trainer.data.source import Source
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError, require

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
    images: tuple[Picture, ...]
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
            except BROKEN as error:
                message = f"{self.where}: expected images to have a readable file {picture.name}, got {error}"
                raise InputError(message) from error
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

    Raises one `InputError` about all the bad rows, each with its place, column, expected and got. With `skipped`
    the good rows are returned instead, if there are any, and `skipped` is called with the report.
    """
    source = open_source(data) if isinstance(data, Path) else data
    rows, problems = read_rows(source)
    if problems:
        skip = skipped is not None and bool(rows)
        report = _report(source, problems, len(rows) + len(problems), " and are left out" if skip else "")
        if not skip:
            raise InputError(problems[0] if len(problems) == 1 else report)
        skipped(report)
    require(bool(rows), source.name, "the data set", "number of rows", ">= 1", 0)
    return rows


def read_rows(source: Source) -> tuple[list[Row], list[str]]:
    """The good rows, and what is wrong with each of the others. Raises `InputError` where nothing can be read."""
    rows: list[Row] = []
    problems: list[str] = []
    for where, values in source.rows():
        try:
            row = _row(len(rows), where, values, source.folder)
            if rows:  # one batch is rendered one way
                first, kind = type(rows[0].prompt).__name__, type(row.prompt).__name__
                require(kind == first, where, "prompt", "type", f"{first} (as {rows[0].where})", kind)
            rows.append(row)
        except InputError as error:
            problems.append(str(error))
    return rows, problems


def _report(source: Source, problems: Sequence[str], total: int, fate: str) -> str:
    shown = problems[:SHOWN]
    which = f"; the first {SHOWN}" if len(problems) > SHOWN else ""
    return "\n  ".join([f"{source.name}: {len(problems)} of {total} rows cannot be used{fate}{which}:", *shown])


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """A seeded shuffle of `rows`, cut after `fraction` of them: the rows of stage 1 and those of stage 2."""
    require(
        len(rows) >= 2,
        "data.train",
        "the data set",
        "number of rows",
        ">= 2 (two stages share it)",
        len(rows),
    )
    order = list(rows)
    random.Random(seed).shuffle(order)
    cut = min(max(round(fraction * len(order)), 1), len(order) - 1)
    return order[:cut], order[cut:]


def distinct_prompts(rows: Sequence[Row]) -> list[Row]:
    """The first row of each (prompt, images): the scenes to caption, whatever number of pairs they are in."""
    seen: dict[tuple[str, tuple[Picture, ...]], Row] = {}
    for row in rows:
        seen.setdefault((json.dumps(row.prompt), row.images), row)
    return list(seen.values())


def _row(row_id: int, where: str, values: Any, folder: Path) -> Row:
    if isinstance(values, InputError):
        raise values
    require(isinstance(values, dict), where, "the row", "type", "object", type(values).__name__)
    values = canonical(where, values)
    prompt = _content(where, values, "prompt")
    chosen, rejected = (_content(where, values, name) for name in ("chosen", "rejected"))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, list):
            ok = isinstance(prompt, list) and len(answer) == 1 and answer[0]["role"] == "assistant"
            require(
                ok,
                where,
                name,
                "content",
                "text, or one assistant message after a prompt of messages",
                answer,
            )
    require(chosen != rejected, where, "rejected", "an answer", "other than chosen", repr(rejected))
    references = values.get("references", [answer_text(chosen)])
    texts = isinstance(references, list) and all(isinstance(text, str) and text.strip() for text in references)
    require(texts and bool(references), where, "references", "type", "list of texts, not empty", repr(references))
    source = values.get("negative_source", "dataset")
    named = isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9_]+", source) is not None
    named = named and source not in ("chosen", "onpolicy")  # names of the other sets that are probed
    require(named, where, "negative_source", "form", "a word other than chosen and onpolicy", repr(source))
    images = pictures_of(where, values, folder)
    return Row(row_id, where, prompt, chosen, rejected, images, tuple(references), source)


def answer_text(answer: str | list[Message]) -> str:
    """An answer as plain text: the text itself, or the text parts of its message."""
    if isinstance(answer, str):
        return answer
    content = answer[0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _content(where: str, values: dict[str, Any], name: str) -> str | list[Message]:
    require(name in values, where, name, "a", "value", "no such column")
    value = values[name]
    if isinstance(value, str):
        require(bool(value.strip()), where, name, "length", ">= 1 word", repr(value))
        return value
    messages = isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and _is_message_content(message)
        for message in value
    )
    require(messages, where, name, "type", "text or list of messages (role, content)", type(value).__name__)
    require(bool(value), where, name, "length", ">= 1 message", 0)
    return value


def _is_message_content(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)
    )
