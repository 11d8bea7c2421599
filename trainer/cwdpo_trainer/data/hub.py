"""Rows from data sets of the `datasets` library: of the Hub, or of a local folder.

Columns are those of data.py and layouts.py; other columns are not read. Images (of the feature `Image`, or bytes)
stay in the data set's memory-mapped file until a batch needs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from cwdpo_trainer.data.images import StoredImage
from cwdpo_trainer.data.layouts import ALL_COLUMNS
from cwdpo_trainer.data.source import DEFAULT_SPLIT, HUB, Source
from cwdpo_trainer.errors import InputError, describe, require

NAME = re.compile(r"(?P<name>[^:]+)(?::(?P<configuration>[^:\[\]]+)(?=:))?(?::(?P<split>.+))?")
IMAGE_COLUMNS = ("image", "images")
BATCH = 1000  # rows that are turned into Python objects at a time


class DatasetSource(Source):
    """`dataset` under the name that messages use."""

    def __init__(self, name: str, dataset: Dataset, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.dataset = dataset
        # Arrow's own tables: the library would decode images, and copy their bytes to look at a row.
        self.tables = dataset.with_format("arrow")

    def rows(self) -> Iterator[tuple[str, Any]]:
        stored = [column for column in IMAGE_COLUMNS if self._has_bytes(column)]
        counts = {column: self._image_counts(column) for column in stored}
        others = [column for column in self.dataset.column_names if column in ALL_COLUMNS and column not in stored]
        known, found = ", ".join(sorted(ALL_COLUMNS)), ", ".join(self.dataset.column_names)
        require(bool(others), self.name, "columns", f"some of {known}", found)
        texts = self.tables.select_columns(others)
        place = 0
        for table in texts.iter(batch_size=BATCH):
            for values in table.to_pylist():
                for column in stored:
                    values[column] = self._pictures(place, column, counts[column][place])
                yield f"{self.name}[{place}]", _without_nulls(values)
                place += 1

    def digest(self) -> str:
        """The library's fingerprint: of the files and the split for a loaded data set, else as it was saved."""
        return self.dataset._fingerprint

    def unused_columns(self) -> list[str]:
        return sorted(set(self.dataset.column_names) - ALL_COLUMNS)

    def _has_bytes(self, column: str) -> bool:
        schema = self.dataset.features.arrow_schema
        return column in schema.names and _contains_bytes(schema.field(column).type)

    def _image_counts(self, column: str) -> list[int | None]:
        """Images in each row: an int for a list of them, None for null."""
        counts: list[int | None] = []
        for table in self.tables.select_columns([column]).iter(batch_size=BATCH):
            values = table[column]
            found = pc.list_value_length(values) if _is_list(values.type) else pc.cast(pc.is_valid(values), pa.int32())
            counts += found.to_pylist()
        return counts

    def _pictures(self, place: int, column: str, count: int | None) -> Any:
        pictures = [
            StoredImage(f"{self.name}[{place}] {column}[{number}]", partial(self._read, place, column, number))
            for number in range(count or 0)
        ]
        return pictures[0] if column == "image" and len(pictures) == 1 else pictures or None

    def _read(self, place: int, column: str, number: int) -> bytes:
        value = self.tables[place : place + 1][column][0].as_py()
        value = value[number] if isinstance(value, list) else value
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path is None:
            raise OSError("no bytes and no path")
        return (self.folder / path).read_bytes() if data is None else data


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _contains_bytes(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _contains_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_contains_bytes(kind.field(place).type) for place in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _without_nulls(value: Any) -> Any:
    """A column of dicts has every key in every row, null where it was absent: a text part with an image, say."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def open_hub(text: str, folder: Path) -> DatasetSource:
    """The data set `hub:owner/name[:split]` or `hub:owner/name:configuration:split`."""
    match = NAME.fullmatch(text.removeprefix(HUB))
    expected = "a name of the form hub:owner/name[:split] or hub:owner/name:configuration:split"
    require(match is not None, text, "", expected, repr(text))
    name, configuration, split = match["name"], match["configuration"], match["split"] or DEFAULT_SPLIT
    return DatasetSource(text, _load(text, name, configuration, split), folder)


def open_folder(folder: Path, split: str) -> DatasetSource:
    """What `save_to_disk` wrote to `folder`, or the data files in it."""
    name = f"{folder}:{split}"
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return DatasetSource(name, _load(name, str(folder), None, split), folder)
    dataset = load_from_disk(folder)
    if isinstance(dataset, DatasetDict):
        require(split in dataset, name, "split", "one of " + ", ".join(dataset), repr(split))
        return DatasetSource(name, dataset[split], folder)
    own = str(dataset.split) if dataset.split else DEFAULT_SPLIT
    require(split in (own, DEFAULT_SPLIT), name, "split", repr(own), repr(split))
    return DatasetSource(str(folder), dataset, folder)


def _load(where: str, name: str, configuration: str | None, split: str) -> Dataset:
    try:
        return load_dataset(name, configuration, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(where, "", "a dataset that the `datasets` library can load", describe(error)) from error
