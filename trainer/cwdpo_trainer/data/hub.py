"""Rows from datasets of the `datasets` library: on the Hub, or in a local folder.

Only the columns of rows.py and layouts.py are read. Images (of the feature `Image`, or bytes) stay in the dataset's
memory-mapped file until a batch needs them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from cwdpo_trainer.data.images import StoredImage
from cwdpo_trainer.data.layouts import ALL_COLUMNS
from cwdpo_trainer.data.source import DEFAULT_SPLIT, HUB, Source
from cwdpo_trainer.errors import InputError, describe, require

NAME = re.compile(r"(?P<name>[^:]+)(?::(?P<configuration>[^:\[\]]+)(?=:))?(?::(?P<split>.+))?")
IMAGE_COLUMNS = ("image", "images")
BATCH = 1000  # rows to convert to Python objects at a time


class DatasetSource(Source):
    """A dataset in memory or on disk, called `name` in messages."""

    def __init__(self, name: str, dataset: Dataset, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.dataset = dataset
        # Arrow tables, because the library's own format would decode every image of a row that is read.
        self.tables = dataset.with_format("arrow")

    def rows(self) -> Iterator[tuple[str, Any]]:
        stored = [column for column in IMAGE_COLUMNS if self._has_bytes(column)]
        counts = {column: self._image_counts(column) for column in stored}
        empty = {column: self._rows_with_empty_images(column) for column in stored}
        others = self._other_columns()
        known, found = ", ".join(sorted(ALL_COLUMNS - set(IMAGE_COLUMNS))), ", ".join(self.dataset.column_names)
        require(bool(others), self.name, "columns", f"some of {known}", found)
        index = 0
        for table in self.tables.select_columns(others).iter(batch_size=BATCH):
            for values in table.to_pylist():
                where = f"{self.name}[{index}]"
                broken = [column for column in stored if index in empty[column]]
                for column in stored:
                    values[column] = self._images(index, column, counts[column][index])
                problem = InputError(where, ", ".join(broken), "an image in each element of the list", "null")
                # Null columns stay, as in a file: layouts.py says what they mean.
                yield where, problem if broken else {key: _without_nulls(value) for key, value in values.items()}
                index += 1

    def digest(self) -> str:
        """SHA-256 of the columns that are read, without stored images. The library's fingerprint would change with a
        file's time or folder, and miss changes inside of a saved dataset."""
        digest = hashlib.sha256()
        for table in self.tables.select_columns(self._other_columns()).iter(batch_size=BATCH):
            for values in table.to_pylist():
                digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def unused_columns(self) -> list[str]:
        return sorted(set(self.dataset.column_names) - ALL_COLUMNS)

    def _other_columns(self) -> list[str]:
        """The columns that are read, without those of stored images."""
        names = self.dataset.column_names
        return [name for name in names if name in ALL_COLUMNS and not (name in IMAGE_COLUMNS and self._has_bytes(name))]

    def _has_bytes(self, column: str) -> bool:
        schema = self.dataset.features.arrow_schema
        return column in schema.names and _contains_bytes(schema.field(column).type)

    def _image_counts(self, column: str) -> list[int | None]:
        """Number of images in each row; None for null."""
        counts: list[int | None] = []
        for table in self.tables.select_columns([column]).iter(batch_size=BATCH):
            values = table[column]
            found = pc.list_value_length(values) if _is_list(values.type) else pc.cast(pc.is_valid(values), pa.int32())
            counts += found.to_pylist()
        return counts

    def _rows_with_empty_images(self, column: str) -> set[int]:
        """The rows with a list of images that has a null, or an image without bytes and path, among its elements."""
        found: set[int] = set()
        start = 0
        for table in self.tables.select_columns([column]).iter(batch_size=BATCH):
            for chunk in table[column].chunks:
                if _is_list(chunk.type):
                    parents = pc.list_parent_indices(chunk).filter(_is_empty(pc.list_flatten(chunk)))
                    found.update(start + row for row in parents.to_pylist())
                start += len(chunk)
        return found

    def _images(self, index: int, column: str, count: int | None) -> Any:
        images = [
            StoredImage(f"{self.name}[{index}] {column}[{number}]", partial(self._read, index, column, number))
            for number in range(count or 0)
        ]
        return images[0] if column == "image" and len(images) == 1 else images or None

    def _read(self, index: int, column: str, number: int) -> bytes:
        value = self.tables[index : index + 1][column][0].as_py()
        value = value[number] if isinstance(value, list) else value
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str):
            raise OSError("the cell has neither the bytes of an image nor a path")
        return (self.folder / path).read_bytes()


def _is_empty(images: pa.Array) -> pa.Array:
    """For each image whether it is null, or a struct with nulls alone."""
    empty = pc.is_null(images)
    if not pa.types.is_struct(images.type):
        return empty
    fields = [pc.is_null(field) for field in images.flatten()]
    return pc.or_(empty, reduce(pc.and_, fields))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _contains_bytes(kind: pa.DataType) -> bool:
    if _is_list(kind):
        return _contains_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_contains_bytes(kind.field(index).type) for index in range(kind.num_fields))
    types = pa.types
    return any(is_kind(kind) for is_kind in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary,
                                             types.is_binary_view))  # fmt: skip


def _without_nulls(value: Any) -> Any:
    """Remove keys whose value is null: Arrow gives every struct of a column all keys, so that an image part of a
    message has a null `text`."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def open_hub(text: str, folder: Path) -> DatasetSource:
    """The dataset `hub:owner/name[:split]` or `hub:owner/name:configuration:split`."""
    match = NAME.fullmatch(text.removeprefix(HUB))
    if match is None:
        expected = "a name of the form hub:owner/name[:split] or hub:owner/name:configuration:split"
        raise InputError(text, "", expected, repr(text))
    name, configuration, split = match["name"], match["configuration"], match["split"] or DEFAULT_SPLIT
    return DatasetSource(text, _load(text, name, configuration, split), folder)


def open_folder(folder: Path, split: str) -> DatasetSource:
    """The dataset that `save_to_disk` wrote to `folder`, or the data files in it."""
    name = f"{folder}:{split}"
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return DatasetSource(name, _load(name, str(folder), None, split), folder)
    with _loading(name):
        dataset = load_from_disk(folder)
    if isinstance(dataset, DatasetDict):
        require(split in dataset, name, "split", "one of " + ", ".join(dataset), repr(split))
        return DatasetSource(name, dataset[split], folder)
    own = str(dataset.split) if dataset.split else DEFAULT_SPLIT
    require(split in (own, DEFAULT_SPLIT), name, "split", repr(own), repr(split))
    return DatasetSource(str(folder), dataset, folder)


def _load(where: str, name: str, configuration: str | None, split: str) -> Dataset:
    with _loading(where):
        return load_dataset(name, configuration, split=split)


@contextlib.contextmanager
def _loading(where: str) -> Iterator[None]:
    """Turn what the library raises about a dataset into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged files raise any type
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:  # it says nothing itself
            cause = cause.__cause__
        found = describe(cause if isinstance(cause, Exception) else error)
        raise InputError(where, "", "a dataset that the `datasets` library can load", found) from error
