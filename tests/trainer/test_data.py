"""Rows are checked one by one: a wrong one is named by file, line and column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cwdpo_trainer.data.rows import distinct_prompts, load_rows, split_rows
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


def test_all_bad_rows_are_counted_and_the_first_ten_shown(tmp_path):
    path = write(tmp_path, GOOD, *[without("chosen")] * 11, GOOD, "{oops")
    with pytest.raises(InputError) as error:
        load_rows(path)
    first, *shown = str(error.value).split("\n")
    assert first == f"{path}: 12 of 14 rows cannot be used; the first 10:"
    assert [line.split(": expected")[0].strip() for line in shown] == [f"{path}:{line}" for line in range(2, 12)]


def test_bad_rows_are_skipped_on_request_and_reported(tmp_path):
    path = write(tmp_path, without("chosen"), GOOD, "{oops", {**GOOD, "prompt": [{"role": "user", "content": "x"}]})
    reports: list[str] = []
    (row,) = load_rows(path, reports.append)
    assert (row.id, row.where) == (0, f"{path}:2")
    (report,) = reports
    assert report.startswith(
        f"{path}: 3 of 4 rows cannot be used and are left out:\n  {path}:1: expected chosen to have a value"
    )
    assert f"{path}:4: expected prompt to have type str (as {path}:2), got list" in report
    load_rows(write(tmp_path, GOOD), reports.append)
    assert len(reports) == 1


def test_a_file_of_bad_rows_alone_is_never_skipped(tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 rows cannot be used"):
        load_rows(write(tmp_path, "{oops", "{oops"), print)


def test_a_json_file_has_an_array_of_rows(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "rejected": "c"}], indent=1), encoding="utf-8-sig")
    assert [(row.where, row.rejected) for row in load_rows(path)] == [(f"{path}:2", "b"), (f"{path}:7", "c")]
    path.write_text(json.dumps(GOOD) + "\n")
    assert [row.where for row in load_rows(path)] == [f"{path}:1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n]", "pairs.json: expected the data set to have number of rows >= 1, got 0"),
        ('[\n{"prompt": "x"}]', "pairs.json:2: expected chosen to have a value"),
        ("[\n%s,\n{oops]", "pairs.json:3: expected the row to have valid JSON"),
        ("[%s\n%s]", "pairs.json:1: expected the row to have after it , or ], got '{'"),
        ("[%s,\n", "pairs.json:2: expected the row to have valid JSON"),
        ("[%s", "pairs.json:1: expected the row to have after it , or ], got ''"),
    ],
)
def test_a_mistake_in_an_array_is_named(tmp_path, text, message):
    path = tmp_path / "pairs.json"
    path.write_text(text.replace("%s", json.dumps(GOOD)))
    with pytest.raises(InputError) as error:
        load_rows(path)
    assert message in str(error.value)


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"pairs.jsonl: expected the data set to have encoding UTF-8"):
        load_rows(tmp_path / "pairs.jsonl")


def test_defaults_and_image_paths(tmp_path):
    (tmp_path / "one.png").touch()
    row, plain = load_rows(write(tmp_path, {**GOOD, "image": "one.png"}, GOOD))
    assert [picture.name for picture in row.images] == [str(tmp_path / "one.png")]
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
