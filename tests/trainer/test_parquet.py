"""Folders of Parquet files, and damaged datasets: every type that a column can have gives the row or a named error."""

from __future__ import annotations

import datetime
import decimal
import io
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from cwdpo_trainer.data.rows import Row, distinct_prompts, load_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError

GOOD = {"prompt": "<image> describe", "chosen": "a red square", "rejected": "a blue square"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, **columns: Any) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({**{name: [value] for name, value in GOOD.items()}, **columns}), folder / "train.parquet")
    return folder


def load(folder: Path, **columns: Any) -> list[Row]:
    return load_rows(open_source(write(folder / "set", **columns)))


TEXT_TYPES = {
    "dictionary": lambda text: pa.array([text]).dictionary_encode(),
    "large": lambda text: pa.array([text], pa.large_string()),
    "view": lambda text: pa.array([text], pa.string_view()),
}
IMAGE_TYPES = {
    "large": pa.array([PNG], pa.large_binary()),
    "fixed size": pa.array([PNG], pa.binary(len(PNG))),
    "view": pa.array([PNG], pa.binary_view()),
    "dictionary": pa.array([PNG]).dictionary_encode(),
    "struct": pa.array([{"bytes": PNG, "path": None}]),
    "path": pa.array([{"path": "red.png"}]),
    "list of one": pa.array([[PNG]]),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_texts_of_every_type(tmp_path, kind):
    (row,) = load(tmp_path, **{name: TEXT_TYPES[kind](text) for name, text in GOOD.items()})
    assert (row.prompt, row.chosen, row.rejected) == tuple(GOOD.values())


@pytest.mark.parametrize("kind", IMAGE_TYPES)
def test_images_of_every_type(tmp_path, kind):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "red.png").write_bytes(PNG)
    (row,) = load(tmp_path, image=IMAGE_TYPES[kind])
    assert [image.getpixel((0, 0)) for image in row.load_images()] == [(255, 0, 0)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": pa.array([None], pa.string())}, "prompt: expected a value, got null"),
        ({"prompt": pa.array([None])}, "prompt: expected a value, got null"),
        ({"chosen": pa.array([None], pa.string())}, "chosen: expected a value, got none"),
        ({"prompt": [3]}, "prompt: expected text or a list of messages with role and content, got int"),
        ({"prompt": [b"abc"]}, "prompt: expected text or a list of messages with role and content, got bytes"),
        ({"prompt": [datetime.datetime(2026, 1, 1)]}, "prompt: expected text or a list of messages"),
        ({"image": [3]}, "image: expected a path or a data: URI, got int"),
        ({"image": [{"url": "http://x.org/a.png"}]}, "image: expected a path or a data: URI, got dict"),
        ({"images": [["red.png", None]]}, "images: expected a list of paths or data: URIs"),
        ({"references": [["a", None]]}, "references: expected a non-empty list of texts, got ['a', None]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_value_of_another_type_is_named(tmp_path, columns, message):
    with pytest.raises(InputError) as error:
        load(tmp_path, **columns)
    assert str(error.value).startswith(f"{tmp_path}/set:train[0]: {message}")


@pytest.mark.parametrize("value", [datetime.datetime(2026, 1, 1), decimal.Decimal("1.5"), b"abc"], ids=str)
def test_other_keys_of_messages_may_have_any_type(tmp_path, value):
    prompt = [{"role": "user", "content": "x", "at": value}]
    rows = load(tmp_path, prompt=[prompt])
    assert distinct_prompts(rows) == rows
    assert rows[0].prompt[0]["content"] == "x"


def test_an_image_in_a_message_part_and_in_the_column(tmp_path):
    part = {"type": "image", "image": PNG}
    rows = load(tmp_path, prompt=[[{"role": "user", "content": [part]}]], images=[[PNG]])
    assert distinct_prompts(rows) == rows


def test_the_digest_is_of_the_content(tmp_path):
    """Not of the file's time or place, as the library's fingerprint is; and damage inside of a saved dataset counts."""
    digest = open_source(write(tmp_path / "a")).digest()
    os.utime(tmp_path / "a" / "train.parquet", (1e9, 1e9))
    assert digest == open_source(tmp_path / "a").digest() == open_source(write(tmp_path / "b")).digest()
    assert digest != open_source(write(tmp_path / "c", chosen=["a red circle"])).digest()
    for name, row in (("saved", GOOD), ("other", {**GOOD, "chosen": "a red circle"})):
        Dataset.from_list([row]).save_to_disk(tmp_path / name)
    before = open_source(tmp_path / "saved").digest()
    file = "data-00000-of-00001.arrow"
    shutil.copy(tmp_path / "other" / file, tmp_path / "saved" / file)
    assert open_source(tmp_path / "saved").digest() != before


def test_a_split_of_a_folder_may_be_a_slice(tmp_path):
    table = pa.table({name: [value] * 3 for name, value in GOOD.items()})
    (tmp_path / "a:b").mkdir()
    pq.write_table(table, tmp_path / "a:b" / "train.parquet")
    sizes = {split: len(load_rows(open_source(f"a:b{split}", tmp_path))) for split in ("", ":train", ":train[:2]")}
    assert sizes == {"": 3, ":train": 3, ":train[:2]": 2}
    with pytest.raises(
        InputError, match=r"a:b:train\[:x\]: expected a dataset that .* Unrecognized instruction format"
    ):
        open_source("a:b:train[:x]", tmp_path)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["", "[]", "3", '{"_data_files": 3, "splits": 3, "features": 3}'])
def test_a_damaged_file_of_a_dataset_is_one_error(tmp_path, name, content):
    dataset: Any = Dataset.from_list([GOOD])
    if name == "dataset_dict.json":
        dataset = DatasetDict({"train": dataset})
    dataset.save_to_disk(tmp_path / "set")
    (tmp_path / "set" / name).write_text(content)
    with pytest.raises(
        InputError, match=r"set:train: expected a dataset that the `datasets` library can load, got \w+"
    ):
        load_rows(open_source(tmp_path / "set"))


def test_the_cause_is_named(tmp_path):
    write(tmp_path / "set")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "set" / "train-2.parquet")
    with pytest.raises(InputError, match=r"set:train: expected a dataset .* got CastError: Couldn't cast \w+: "):
        open_source(tmp_path / "set")
