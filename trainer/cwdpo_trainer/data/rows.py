"""Preference rows from files or datasets (sources.py), all checked before a run writes anything.

A row has the columns

    prompt     text with the model's image placeholders, or a list of chat messages
    chosen     the preferred answer: text, or a list with one assistant message
    rejected   the rejected answer, likewise
    images     optional list of paths (relative to the file) or `data:` URIs. In a dataset of the `datasets` library
               also images or their bytes. `image` may have a single one instead
    references optional list of texts that count as correct answers (default: the chosen answer)
    negative_source  optional name of the origin of the rejected answer; the probes report a group per name

or those of another project's layout (layouts.py). Text is used as it is: nothing is inserted between prompt and answer,
and the end-of-sequence token follows the answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cwdpo_trainer.data.images import IMAGE_ERRORS, ImageRef, image_refs, unreadable
from cwdpo_trainer.data.layouts import canonical
from cwdpo_trainer.data.source import Source
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError, InputErrors, require, shorten, surrogate_in
from cwdpo_trainer.files import NESTED

SHOWN_ROWS = 10  # rows that a report lists
PART_IMAGES = ("image", "image_url", "url", "path", "base64", "bytes")  # keys of message parts that name an image
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One preference pair. `id` is its index among the valid rows, `where` is "file:line" or "dataset[index]"."""

    id: int
    where: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    images: tuple[ImageRef, ...]
    references: tuple[str, ...]
    negative_source: str
    # Limits on a row that is too long (lengths.py): pixels per image, and tokens per answer.
    max_pixels: int | None = None
    max_answer: int | None = None

    def load_images(self) -> list[Image.Image]:
        """Decode the images. Raises `InputError` about one that cannot be read."""
        loaded = []
        for image in self.images:
            try:
                loaded.append(_shrunk(image.load(), self.max_pixels))
            except IMAGE_ERRORS as error:
                raise unreadable(self.where, image, error) from error
        return loaded


def _shrunk(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image, resized to at most `max_pixels` pixels with its aspect ratio kept."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def load_rows(data: Source | Path, skipped: Callable[[str], None] | None = None) -> list[Row]:
    """All rows of a source, or of the file at a path.

    Raises `InputError` about an invalid row, or `InputErrors` about several. Given `skipped`, it returns the valid rows
    instead, if there are any, and calls `skipped` with a report about the invalid ones.
    """
    source = open_source(data) if isinstance(data, Path) else data
    rows, errors = read_rows(source)
    if errors:
        report_bad_rows(source.name, len(rows) + len(errors), errors, skipped)
    require(bool(rows), source.name, "", "at least 1 row", 0)
    return rows


def report_bad_rows(name: str, total: int, errors: Sequence[InputError], skipped: Callable[[str], None] | None) -> None:
    """Raise the error about the invalid rows among the `total` rows of a source. Given `skipped`, call that with a
    report instead, if there are valid rows too."""
    title = f"{name}: {len(errors)} of {total} rows are invalid"
    if skipped is None or len(errors) == total:
        raise errors[0] if len(errors) == 1 else InputErrors(title, errors, SHOWN_ROWS)
    skipped(str(InputErrors(f"{title} and are skipped", errors, SHOWN_ROWS)))


def read_rows(source: Source) -> tuple[list[Row], list[InputError]]:
    """Return the valid rows, and one error per invalid row. Raises `InputError` if the source cannot be read."""
    rows: list[Row] = []
    errors: list[InputError] = []
    for where, values in source.rows():
        try:
            row = _row(len(rows), where, values, source.folder)
            if rows:  # the rows of a batch go through the processor together
                first, kind = (_kind(each.prompt) for each in (rows[0], row))
                require(kind == first, where, "prompt", f"{first}, as in {rows[0].where}", kind)
            rows.append(row)
        except InputError as error:
            errors.append(error)
        except RecursionError:  # of a repr or a comparison
            errors.append(InputError(where, "", "valid JSON", NESTED))
    return rows, errors


def _kind(prompt: str | list[Message]) -> str:
    return "text" if isinstance(prompt, str) else "a list of messages"


def first_part(count: int, fraction: float) -> int:
    """How many of `count` rows stage 1 takes: `fraction` of them, but each stage at least one."""
    return min(max(round(fraction * count), 1), count - 1)


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle `rows` with `seed` and split them: `fraction` of them for stage 1, the others for stage 2."""
    require(len(rows) >= 2, "config", "data.train", "at least 2 rows, as two stages share them", len(rows))
    order = list(rows)
    random.Random(seed).shuffle(order)
    cut = first_part(len(order), fraction)
    return order[:cut], order[cut:]


def distinct_prompts(rows: Sequence[Row]) -> list[Row]:
    """The first row of each distinct (prompt, images)."""
    seen: dict[tuple[str, tuple[ImageRef, ...]], Row] = {}
    for row in rows:
        seen.setdefault((json.dumps(row.prompt), row.images), row)
    return list(seen.values())


def answer_text(answer: str | list[Message]) -> str:
    """An answer as plain text: the text itself, or the text parts of its message."""
    if isinstance(answer, str):
        return answer
    content = answer[0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _row(row_id: int, where: str, values: Any, folder: Path) -> Row:
    if isinstance(values, InputError):
        raise values
    require(isinstance(values, dict), where, "", "a JSON object", type(values).__name__)
    _check_unicode(where, values)
    values = canonical(where, values)
    prompt = _content(where, values, "prompt")
    chosen, rejected = (_answer(where, values, name, prompt) for name in ("chosen", "rejected"))
    _check_parts(where, prompt, values)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        types = {part["type"] for part in message_parts(answer)}
        require(types <= {"text"}, where, name, "message parts of type text", ", ".join(map(repr, types)))
        text, others = _parts_of_answer(answer)
        got = f"a message without text: {shorten(repr(answer))}"
        require(bool(text.strip() or others), where, name, "text", got)
    differ = _parts_of_answer(chosen) != _parts_of_answer(rejected)
    require(differ, where, "rejected", "an answer that differs from chosen", shorten(repr(rejected)))
    references = values.get("references", [answer_text(chosen)])
    texts = isinstance(references, list) and all(isinstance(text, str) and text.strip() for text in references)
    require(texts and bool(references), where, "references", "a non-empty list of texts", shorten(repr(references)))
    source = values.get("negative_source", "dataset")
    is_name = isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9_]+", source) is not None
    free = is_name and source not in ("chosen", "onpolicy")  # the probes use these names for other answers
    expected = "letters, digits and underscores, other than 'chosen' and 'onpolicy'"
    require(free, where, "negative_source", expected, shorten(repr(source)))
    images = image_refs(where, values, folder)
    prompt, chosen, rejected = map(_as_json, (prompt, chosen, rejected))
    return Row(row_id, where, prompt, chosen, rejected, images, tuple(references), source)


def _parts_of_answer(answer: str | list[Message]) -> tuple[str, dict[str, Any]]:
    """An answer's text, and what else its message has, such as tool calls."""
    fields = {} if isinstance(answer, str) else answer[0]
    return answer_text(answer), {
        key: value for key, value in fields.items() if key not in ("role", "content") and value
    }


def _as_json(value: Any) -> Any:
    """A value of a dataset with JSON types alone, as in a file: messages may have other keys with times, or images."""
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_json(one) for one in value]
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def _check_unicode(where: str, values: dict[str, Any]) -> None:
    """JSON can write half of a surrogate pair ("\\ud83d" of an emoji), which is no text: tokenizers fail on it."""
    for column, value in values.items():
        for text in (column, *_texts(value)):
            if (index := surrogate_in(text)) is not None:
                got = f"half of a surrogate pair at character {index} of {shorten(ascii(text))}"
                raise InputError(where, ascii(column)[1:-1], "Unicode text", got)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value:
            yield from _texts(item)
        yield from _texts(list(value.values())) if isinstance(value, dict) else ()


def _check_parts(where: str, prompt: str | list[Message], values: dict[str, Any]) -> None:
    """Message parts are texts and placeholders of the row's images. An image that a part names itself must be the one
    in the column, because only that one is loaded."""
    column = [values["image"]] if "image" in values else values.get("images", [])
    images = iter(column if isinstance(column, list) else [])
    for part in message_parts(prompt):
        known = part["type"] in ("text", "image")
        require(known, where, "prompt", "message parts of type text or image", shorten(repr(part)))
        own = [part[key] for key in PART_IMAGES if part.get(key) is not None]
        listed = next(images, None) if part["type"] == "image" else None
        expected = "images in the column images, in the order of the message parts"
        found = f"another image in a message part: {shorten(repr(part))}"
        require(all(image == listed or _is_loaded(listed) for image in own), where, "prompt", expected, found)


def message_parts(text: str | list[Message]) -> list[dict[str, Any]]:
    """The parts of all messages; none of a text or of messages that are plain text."""
    messages = [] if isinstance(text, str) else text
    return [part for message in messages if isinstance(message["content"], list) for part in message["content"]]


def _is_loaded(image: Any) -> bool:
    """Whether `image` comes from a dataset as bytes, so that it cannot be compared with a name."""
    return isinstance(image, ImageRef)


def _answer(where: str, values: dict[str, Any], name: str, prompt: str | list[Message]) -> str | list[Message]:
    answer = _content(where, values, name)
    if isinstance(answer, list):
        ok = isinstance(prompt, list) and len(answer) == 1 and answer[0]["role"] == "assistant"
        expected = "text, or one assistant message after a prompt of messages"
        require(ok, where, name, expected, shorten(repr(answer)))
    return answer


def _content(where: str, values: dict[str, Any], name: str) -> str | list[Message]:
    """Text or messages in the column `name`."""
    require(name in values, where, name, "a value", "none")
    value = values[name]
    if isinstance(value, str):
        require(bool(value.strip()), where, name, "text", "only white space" if value else "an empty string")
        return value
    ok = isinstance(value, list) and all(map(_is_message, value))
    got = shorten(repr(value)) if isinstance(value, list) else type(value).__name__
    require(ok, where, name, "text or a list of messages with role and content", got)
    require(bool(value), where, name, "at least 1 message", 0)
    return value


def _is_message(value: Any) -> bool:
    """Whether `value` has a role, and content that is text or a list of parts with a type."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if not isinstance(content, list):
        return isinstance(content, str)
    return all(
        isinstance(part, dict) and isinstance(part.get("type"), str) and isinstance(part.get("text", ""), str)
        for part in content
    )
