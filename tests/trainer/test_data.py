"""Rows are checked one by one: a wrong one is named by file, line and column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_trainer.data import distinct_prompts, load_rows, split_rows
from cwdpo_trainer.errors import InputError

GOOD = {"prompt": "<image> describe", "chosen": "a", "rejected": "b"}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("prompt"), "prompt to have a value, got no such column"),
        (without("rejected"), "rejected to have a value, got no such column"),
        ({**GOOD, "chosen": 3}, "chosen to have type text or list of messages (role, content), got int"),
        ({**GOOD, "prompt": "  "}, "prompt to have length >= 1 word, got '  '"),
        ({**GOOD, "prompt": []}, "prompt to have length >= 1 message, got 0"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "prompt to have type text or list of messages"),
        ({**GOOD, "rejected": "a"}, "rejected to have an answer other than chosen, got 'a'"),
        ({**GOOD, "chosen": [{"role": "assistant", "content": "a"}]}, "chosen to have content text, or one"),
        ({**GOOD, "images": ["nowhere.png"]}, "images to have an existing file, got"),
        ({**GOOD, "images": "one.png"}, "images to have type list of texts, got 'one.png'"),
        ({**GOOD, "image": 1}, "image to have type text, got int"),
        ({**GOOD, "image": "a.png", "images": []}, "columns to have one of image, images, got both"),
        ({**GOOD, "references": []}, "references to have type list of texts, not empty, got []"),
        ({**GOOD, "negative_source": "chosen"}, "negative_source to have form a word other than"),
        ({**GOOD, "chosne": "a"}, "columns to have names in prompt, chosen, rejected"),
        ([1], "the row to have type object, got list"),
        ("{oops", "the row to have valid JSON, got Expecting"),
        ({**GOOD, "prompt": [{"role": "user", "content": "x"}]}, "prompt to have type str (as"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    path = write(tmp_path, GOOD, row)
    with pytest.raises(InputError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path}:2: expected ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone.jsonl: expected the data set to have an existing file"):
        load_rows(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"number of rows >= 1, got 0"):
        load_rows(write(tmp_path))


def test_defaults_and_image_paths(tmp_path):
    (tmp_path / "one.png").touch()
    row, plain = load_rows(write(tmp_path, {**GOOD, "image": "one.png"}, GOOD))
    assert row.images == (tmp_path / "one.png",)
    assert (row.references, row.negative_source, row.id) == (("a",), "dataset", 0)
    assert (plain.images, plain.id) == ((), 1)


def test_an_unreadable_image_is_named_when_it_is_loaded(tmp_path):
    (tmp_path / "one.png").write_text("not a picture")
    (row,) = load_rows(write(tmp_path, {**GOOD, "image": "one.png"}))
    with pytest.raises(InputError, match=r"pairs.jsonl:1: expected images to have a readable file .*one.png"):
        row.load_images()


def test_split_is_seeded_disjoint_and_complete(rows):
    first, second = split_rows(rows, 0.75, seed=3)
    assert (len(first), len(second)) == (24, 8)
    assert sorted(row.id for row in first + second) == [row.id for row in rows]
    assert split_rows(rows, 0.75, seed=3)[1] == second
    assert split_rows(rows, 0.75, seed=4)[1] != second


def test_distinct_prompts_keeps_the_first_row_of_a_scene(tmp_path):
    other = {**GOOD, "prompt": "another"}
    rows = load_rows(write(tmp_path, GOOD, {**GOOD, "rejected": "c"}, other))
    assert [row.id for row in distinct_prompts(rows)] == [0, 2]
