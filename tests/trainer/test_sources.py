"""Datasets of the `datasets` library, by Hub name or local folder, give the same rows as a file."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image

from cwdpo_trainer.config.loader import load_config
from cwdpo_trainer.data.images import FileImage, StoredImage
from cwdpo_trainer.data.rows import distinct_prompts, load_rows
from cwdpo_trainer.data.sources import FileSource, open_source
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.run import run

RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
GOOD = {"prompt": "<image> describe", "chosen": "a red square", "rejected": "a blue square"}


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(row) -> list[tuple[int, ...]]:
    return [image.getpixel((0, 0)) for image in row.load_images()]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "column",
    [
        {"images": [RED, BLUE]},
        {"images": [encoded(RED), encoded(BLUE)]},
        {"images": [{"bytes": encoded(RED), "path": None}, {"bytes": None, "path": "blue.png"}]},
        {"image": RED},
        {"image": encoded(RED)},
    ],
    ids=["PIL", "bytes", "dicts", "one PIL", "one bytes"],
)
def test_images_of_every_kind_stay_in_the_dataset_until_needed(tmp_path, column):
    BLUE.save(tmp_path / "blue.png")
    Dataset.from_list([{**GOOD, **column}]).save_to_disk(tmp_path / "set")
    BLUE.save(tmp_path / "set" / "blue.png")
    (row,) = load_rows(open_source("set", tmp_path))
    assert all(isinstance(image, StoredImage) for image in row.images)
    assert row.images[0].name == f"{tmp_path}/set[0] {next(iter(column))}[0]"
    assert row.where == f"{tmp_path}/set[0]"
    assert pixels(row) == [(255, 0, 0), (0, 0, 255)][: len(row.images)]
    assert row.images[0].shape() == ("RGB", (8, 8))


def test_image_paths_are_checked_when_rows_are_read(tmp_path):
    Dataset.from_list([{**GOOD, "images": ["red.png"]}]).save_to_disk(tmp_path / "set")
    source = open_source("set", tmp_path)
    with pytest.raises(InputError, match=r"set\[0\]: images: expected an existing file or a data: URI, got .*red.png"):
        load_rows(source)
    RED.save(tmp_path / "set" / "red.png")
    assert isinstance(load_rows(source)[0].images[0], FileImage)


def test_nulls_that_arrow_adds_to_messages_are_removed(tmp_path):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}]
    row = {
        "prompt": [asked],
        "chosen": answer,
        "rejected": [{**answer[0], "content": [{"type": "text", "text": "no"}]}],
    }
    Dataset.from_list([{**row, "images": [RED]}]).save_to_disk(tmp_path / "set")
    (loaded,) = load_rows(open_source("set", tmp_path))
    assert loaded.prompt == [asked]
    assert loaded.references == ("a red square",)


def test_unknown_columns_are_ignored_and_listed(tmp_path):
    Dataset.from_list([{**GOOD, "model": "x", "split": 3}]).save_to_disk(tmp_path / "set")
    source = open_source("set", tmp_path)
    assert len(load_rows(source)) == 1
    assert source.unused_columns() == ["model", "split"]


def test_a_dataset_without_a_known_column_is_an_error(tmp_path):
    Dataset.from_list([{"question": "what?", "image": RED}]).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match=r"set: columns: expected some of .* got question, image"):
        load_rows(open_source("set", tmp_path))


def test_invalid_rows_are_named_by_index(tmp_path):
    rows = [GOOD, {**GOOD, "chosen": None}, {**GOOD, "rejected": GOOD["chosen"]}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(InputError) as error:
        load_rows(open_source("set", tmp_path))
    assert f"{tmp_path}/set[1]: chosen: expected a value" in str(error.value)
    assert f"{tmp_path}/set[2]: rejected: expected an answer that differs from chosen" in str(error.value)


def test_rows_without_images_in_a_column_of_images(tmp_path):
    schema = Features({**{name: Value("string") for name in GOOD}, "images": List(datasets.Image())})
    rows = [{**GOOD, "images": [RED]}, {**GOOD, "images": []}, {**GOOD, "images": None}]
    Dataset.from_list(rows, features=schema).save_to_disk(tmp_path / "set")
    assert [len(row.images) for row in load_rows(open_source("set", tmp_path))] == [1, 0, 0]


def test_shuffled_and_sliced_datasets_keep_images_and_texts_together(tmp_path):
    rows = [{**GOOD, "chosen": color, "image": Image.new("RGB", (4, 4), color)} for color in ("red", "lime", "blue")]
    Dataset.from_list(rows).select([2, 0]).save_to_disk(tmp_path / "set")
    loaded = load_rows(open_source("set", tmp_path))
    assert [(row.chosen, *pixels(row)) for row in loaded] == [("blue", (0, 0, 255)), ("red", (255, 0, 0))]


def test_splits(tmp_path):
    one, two = (Dataset.from_list([{**GOOD, "chosen": text}]) for text in ("one", "two"))
    DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "set")
    texts = [load_rows(open_source(name, tmp_path))[0].chosen for name in ("set", "set:train", "set:test")]
    assert texts == ["one", "one", "two"]
    with pytest.raises(InputError, match=r"set:dev: split: expected one of train, test, got 'dev'"):
        open_source("set:dev", tmp_path)


def test_hub_names_with_splits_and_slices(tmp_path, monkeypatch):
    """`load_dataset` prefers a folder of that name in the working directory to the dataset on the Hub."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, color in (("train", RED), ("test", BLUE)):
        rows = [{**GOOD, "chosen": f"{split} {index}", "image": color} for index in range(3)]
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    found = {
        name: [row.chosen for row in load_rows(open_source(name))]
        for name in ("hub:owner/name", "hub:owner/name:test", "hub:owner/name:train[1:]", "owner/name:test")
    }
    test = ["test 0", "test 1", "test 2"]
    assert list(found.values()) == [["train 0", "train 1", "train 2"], test, ["train 1", "train 2"], test]
    source = open_source("hub:owner/name:test")
    assert source.digest() == open_source("hub:owner/name:test").digest() != open_source("hub:owner/name").digest()
    (row, *_) = load_rows(source)
    assert (row.where, row.images[0].name) == ("hub:owner/name:test[0]", "hub:owner/name:test[0] image[0]")
    assert pixels(row) == [(0, 0, 255)]
    with pytest.raises(
        InputError, match=r"hub:owner/name:dev: expected a dataset that the `datasets` library can load, got ValueError"
    ):
        open_source("hub:owner/name:dev")


def test_a_configuration_is_between_name_and_split(monkeypatch):
    asked = []

    def load(*args, split):
        asked.append((*args, split))
        return Dataset.from_list([GOOD])

    monkeypatch.setattr("cwdpo_trainer.data.hub.load_dataset", load)
    for text in ("hub:a/b", "hub:a/b:test", "hub:a/b:vqa:test", "hub:a/b:train[:5]", "hub:a/b:vqa:train[1:5]"):
        open_source(text)
    assert asked == [
        ("a/b", None, "train"),
        ("a/b", None, "test"),
        ("a/b", "vqa", "test"),
        ("a/b", None, "train[:5]"),
        ("a/b", "vqa", "train[1:5]"),
    ]


def test_equal_images_in_two_rows_are_one_prompt(tmp_path):
    rows = [{**GOOD, "image": RED}, {**GOOD, "rejected": "no", "image": RED}, {**GOOD, "image": BLUE}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    loaded = load_rows(open_source("set", tmp_path))
    assert [row.id for row in distinct_prompts(loaded)] == [0, 2]


def test_data_uris_in_a_row(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(encoded(RED)).decode()
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD, "images": [uri]}))
    (row,) = load_rows(path)
    assert pixels(row) == [(255, 0, 0)]
    assert row.images[0].name_from(tmp_path) == f"{path}:1 images[0]"


def test_rows_can_be_pickled_for_data_loader_workers(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(encoded(RED)).decode()
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD, "images": [uri]}))
    Dataset.from_list([{**GOOD, "image": RED}]).save_to_disk(tmp_path / "set")
    for (row,) in (load_rows(path), load_rows(open_source("set", tmp_path))):
        assert pixels(pickle.loads(pickle.dumps(row))) == [(255, 0, 0)]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://x.org/a.png", "local files .download them first., got https://x"),
        ("data:image/png,abc", "URIs of the form data:image/...;base64"),
        ("data:image/png;base64,???", "valid base64"),
    ],
)
def test_images_that_cannot_be_used_are_refused(tmp_path, image, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**GOOD, "images": [image]}))
    with pytest.raises(InputError, match=f"pairs.jsonl:1: images: expected {message}"):
        load_rows(path)


def test_anything_that_is_not_a_folder_is_a_file(tmp_path):
    assert isinstance(open_source("gone:train", tmp_path), FileSource)


def as_dataset(path: Path) -> Dataset:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return Dataset.from_list([{**row, "images": [FileImage(path.parent / row["images"][0]).load()]} for row in rows])


def test_a_run_on_datasets_equals_one_on_files(task, settings, tmp_path):
    """Its predictions name the images, and other data under the same name is refused as another run."""
    sets = {name: as_dataset(task / f"{name}.jsonl") for name in ("train", "heldout")}
    DatasetDict(sets).save_to_disk(tmp_path / "set")
    del settings["sft"]
    settings["dpo"] |= {"max_steps": 2, "eval_steps": 2, "onpolicy_fraction": 0.0}
    metrics = []
    for name, data in (("files", settings["data"]), ("sets", {"train": "set", "heldout": "set:heldout"})):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**settings, "data": data, "output_dir": str(tmp_path / name)}))
        metrics.append(run(load_config(path)))
    for one in metrics:
        one.pop("timing")
        assert len(one.pop("data")) == 2  # digests of files and of datasets
    assert metrics[0] == metrics[1]
    (line, *_) = (tmp_path / "sets" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["images"] == [f"{tmp_path}/set:heldout[0] images[0]"]
    shutil.rmtree(tmp_path / "set")
    DatasetDict({**sets, "train": sets["train"].select(range(8))}).save_to_disk(tmp_path / "set")
    with pytest.raises(
        InputError,
        match=r"data.train: expected '.*', as this run was started with \(or .*, got '.*'",
    ):
        run(load_config(path))
