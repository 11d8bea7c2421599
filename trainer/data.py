"""Preference rows from JSONL or JSON files, checked one by one before a run writes anything.

A row has the columns

    prompt     text with the model's image placeholder, or a list of chat messages
    chosen     the good answer: text, or a list of one assistant message
    rejected   the bad answer, likewise
    images     list of paths, relative to the file (or `image`: one path); may be absent
    references optional list of texts that count as right answers (default: the chosen one)
    negative_source  optional name of where the rejected answer is from; the probes group by it

or those of another project's layout, see layouts.py. Text is used as it stands: between prompt and answer
nothing is added but the end-of-sequence token after it. All rows are read before the bad ones are reported.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.layouts import canonical

SHOWN = 10  # bad rows that a report quotes
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One preference pair; `id` is its place in the file, `where` is "file:line"."""

    id: int
    where: str
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    images: tuple[Path, ...]
    references: tuple[str, ...]
    negative_source: str

    def load_images(self) -> list[Image.Image]:
        """The pictures, read now: rows stay small until a batch needs them."""
        loaded = []
        for path in self.images:
            try:
                with Image.open(path) as image:
                    loaded.append(image.convert("RGB") if image.mode not in ("RGB", "L") else image.copy())
            except OSError as error:
                raise InputError(
                    f"{self.where}: expected images to have a readable file {path}, got {error}"
                ) from error
        return loaded


def load_rows(path: Path, skipped: Callable[[str], None] | None = None) -> list[Row]:
    """Every row of the file at `path`: one JSON object a line or, in a .json file, an array of objects.

    Raises one `InputError` about all the bad rows, each with file:line, column, expected and got. With `skipped`
    the good rows are returned instead, if there are any, and `skipped` is called with the report.
    """
    require(path.is_file(), str(path), "the data set", "an existing", "file", "none there")
    rows: list[Row] = []
    problems: list[str] = []
    for where, values in _read(path):
        try:
            row = _row(len(rows), where, values, path.parent)
            if rows:  # one batch is rendered one way
                first, kind = type(rows[0].prompt).__name__, type(row.prompt).__name__
                require(kind == first, where, "prompt", "type", f"{first} (as {rows[0].where})", kind)
            rows.append(row)
        except InputError as error:
            problems.append(str(error))
    if problems:
        skip = skipped is not None and bool(rows)
        report = _report(path, problems, len(rows) + len(problems), " and are left out" if skip else "")
        if not skip:
            raise InputError(problems[0] if len(problems) == 1 else report)
        skipped(report)
    require(bool(rows), str(path), "the data set", "number of rows", ">= 1", 0)
    return rows


def _report(path: Path, problems: Sequence[str], total: int, fate: str) -> str:
    shown = problems[:SHOWN]
    which = f"; the first {SHOWN}" if len(problems) > SHOWN else ""
    return "\n  ".join([f"{path}: {len(problems)} of {total} rows cannot be used{fate}{which}:", *shown])


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", what stands there) of each row; an `InputError` in place of a line that is not JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected the data set to have encoding UTF-8, got {error}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from _read_array(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield f"{path}:{number}", _not_json(f"{path}:{number}", error)


def _not_json(where: str, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{where}: expected the row to have valid JSON, got {error}")


def _read_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of an array, each with the line that it begins in. Nothing after a mistake can be read."""
    decoder, gap = json.JSONDecoder(), re.compile(r"\s*")
    place, number, separator = text.index("["), 1, "["
    line_start = 0  # up to here `number` has counted
    while separator != "]":
        start = gap.match(text, place + 1).end()
        if separator == "[" and text[start : start + 1] == "]":
            return
        number, line_start = number + text.count("\n", line_start, start), start
        where = f"{path}:{number}"
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _not_json(where, error) from error
        yield where, value
        place = gap.match(text, end).end()
        separator = text[place : place + 1]
        require(separator in (",", "]"), where, "the row", "after it", ", or ]", repr(separator))


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
    seen: dict[tuple[str, tuple[Path, ...]], Row] = {}
    for row in rows:
        seen.setdefault((json.dumps(row.prompt), row.images), row)
    return list(seen.values())


def digest(path: Path) -> str:
    """SHA-256 of a file, so that a run can tell whether it goes on with the data that it started with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    images = _images(where, values, folder)
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


def _images(where: str, values: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    require(not ("image" in values and "images" in values), where, "columns", "one of", "image, images", "both")
    if "image" in values:
        require(isinstance(values["image"], str), where, "image", "type", "text", type(values["image"]).__name__)
    paths = [values["image"]] if "image" in values else values.get("images", [])
    ok = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    require(ok, where, "images", "type", "list of texts", repr(paths))
    for path in paths:
        require((folder / path).is_file(), where, "images", "an existing", "file", str(folder / path))
    return tuple(folder / path for path in paths)
