"""Sources of rows: JSONL and JSON files here, datasets of the `datasets` library in hub.py.

    train.jsonl, train.json      one object per line, or an array of objects
    folder[:split]               a dataset saved by `datasets`, or a folder with data files (Parquet, ...)
    hub:owner/name[:split]       a dataset on the Hub; hub:owner/name:configuration:split if it has several

The split defaults to `train`. It may be a slice, as in `hub:owner/name:train[:1000]`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwdpo_trainer.data.source import DEFAULT_SPLIT, HUB, Source
from cwdpo_trainer.errors import InputError, require, shorten
from cwdpo_trainer.files import NESTED, RepeatedKey, read_text, sha256, unique_keys, user_path

SPACE = re.compile(r"\s*")
OTHER_FORMATS = {".csv", ".tsv", ".parquet", ".arrow"}  # that `datasets` reads, from a folder
JSON_TEXT = "JSON lines, or a .json file with an array of rows (of other formats, name the folder with the files)"


def open_source(text: str | Path, base: Path = Path()) -> Source:
    """The source named by `text`, in one of the forms above. Relative paths start at `base`."""
    text = str(text)
    if not text.startswith(HUB):
        text = str(user_path(text))
        folder, split = _folder_and_split(text, base)
        if not folder:
            return FileSource(base / text)
    from cwdpo_trainer.data.hub import open_folder, open_hub  # importing `datasets` takes a second

    return open_hub(text, base) if text.startswith(HUB) else open_folder(base / folder, split)


def _folder_and_split(text: str, base: Path) -> tuple[str, str]:
    """The parts of `folder[:split]`; the folder is "" if there is none. Slices such as `train[:10]` have colons too."""
    ends = [match.start() for match in re.finditer(":", text)]
    for end in (len(text), *reversed(ends)):
        if text[:end] and os.path.isdir(base / text[:end]):
            return text[:end], text[end + 1 :] or DEFAULT_SPLIT
    return "", ""


class FileSource(Source):
    """A file with one JSON object per line, or a .json file with an array of objects."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.folder = path.parent

    def rows(self) -> Iterator[tuple[str, Any]]:
        text = self._text()
        if self.path.suffix.lower() == ".json":
            if text.lstrip().startswith("["):
                yield from _array(self.path, text)
                return
            _check_lines(self.name, text)
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{self.name}:{number}"
                try:
                    yield where, json.loads(line, object_pairs_hook=unique_keys)
                except (ValueError, RecursionError) as error:
                    yield where, _not_json(where, error)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256(self.path)

    def _text(self) -> str:
        suffix = self.path.suffix.lower()
        if suffix in OTHER_FORMATS and self.path.is_file():
            raise InputError(self.name, "", JSON_TEXT, f"a {suffix} file")
        return read_text(self.path)


def _check_lines(name: str, text: str) -> None:
    """Raise `InputError` about a file that is one object on several lines, such as {"data": [...]}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return  # several lines, or a mistake in one of them
    if isinstance(value, dict) and "\n" in text.strip():
        found = f"one object with the keys {shorten(', '.join(map(ascii, value)), 100)}"
        raise InputError(name, "", "an array of rows, or a row in each line", found)


def _not_json(where: str, error: ValueError | RecursionError) -> InputError:
    if isinstance(error, RepeatedKey):
        return InputError(where, "", error.EXPECTED, error)
    return InputError(where, "", "valid JSON", NESTED if isinstance(error, RecursionError) else error)


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of an array, each with the line it starts on. Raises `InputError` at the first syntax error, as what
    follows cannot be parsed."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    position, number, separator = text.index("["), 1, "["
    counted = 0  # `number` is the line of this position
    while separator != "]":
        start = _after_space(text, position + 1)
        if separator == "[" and text[start : start + 1] == "]":
            position = start
            break
        number, counted = number + text.count("\n", counted, start), start
        where = f"{path}:{number}"
        try:
            value, end = decoder.raw_decode(text, start)
        except RepeatedKey as error:
            value, end = _not_json(where, error), json.JSONDecoder().raw_decode(text, start)[1]
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from error
        yield where, value
        position = _after_space(text, end)
        separator = text[position : position + 1]
        found = repr(separator) if separator else "the end of the file"
        require(separator in (",", "]"), where, "", "',' or ']' after the row", found)
    rest = text[position + 1 :].strip()
    number += text.count("\n", counted, position)
    require(not rest, f"{path}:{number}", "", "nothing after the array", shorten(repr(rest[:80])))


def _after_space(text: str, start: int) -> int:
    match = SPACE.match(text, start)
    return match.end() if match else start
