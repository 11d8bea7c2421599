"""Where rows come from: JSONL and JSON files here, data sets of the `datasets` library in hub.py.

    train.jsonl, train.json      one object a line, or an array of objects
    folder[:split]               a data set saved by `datasets`, or a folder of its data files (Parquet, ...)
    hub:owner/name[:split]       a data set of the Hub; hub:owner/name:configuration:split where it has several

The split is `train` where none is given; it may be a slice, as in `hub:owner/name:train[:1000]`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwdpo_trainer.data.source import DEFAULT_SPLIT, HUB, Source
from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.files import read_text


def open_source(text: str | Path, base: Path = Path()) -> Source:
    """The source that `text` names, as in the table above; paths start at `base`."""
    text = str(text)
    if not text.startswith(HUB):
        folder, _, split = text.rpartition(":")
        if (base / text).is_dir():
            folder, split = text, DEFAULT_SPLIT
        if not folder or not (base / folder).is_dir():
            return FileSource(base / text)
    from cwdpo_trainer.data.hub import open_folder, open_hub  # `datasets` takes a second to import

    return open_hub(text, base) if text.startswith(HUB) else open_folder(base / folder, split)


class FileSource(Source):
    """One JSON object a line or, in a .json file, an array of objects."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.folder = path.parent

    def rows(self) -> Iterator[tuple[str, Any]]:
        text = read_text(self.path)
        if self.path.suffix == ".json" and text.lstrip().startswith("["):
            yield from _array(self.path, text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield f"{self.name}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"{self.name}:{number}", _not_json(f"{self.name}:{number}", error)

    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _not_json(where: str, error: json.JSONDecodeError) -> InputError:
    return InputError(where, "", "valid JSON", error)


def _array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
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
        found = repr(separator) if separator else "the end of the file"
        require(separator in (",", "]"), where, "", "',' or ']' after the row", found)
