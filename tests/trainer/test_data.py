"""Rows are checked one by one. Errors name file, line and column."""

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
        (without("prompt"), "prompt: expected a value, or a common start of chosen and rejected"),
        (without("rejected"), "rejected: expected a value, got none"),
        ({**GOOD, "chosen": 3}, "chosen: expected text or a list of messages with role and content, got int"),
        ({**GOOD, "prompt": "  "}, "prompt: expected text, got only white space"),
        ({**GOOD, "chosen": ""}, "chosen: expected text, got an empty string"),
        ({**GOOD, "prompt": []}, "prompt: expected at least 1 message, got 0"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "prompt: expected text or a list of messages"),
        ({**GOOD, "rejected": "a"}, "rejected: expected an answer that differs from chosen, got 'a'"),
        (
            {**GOOD, "chosen": [{"role": "assistant", "content": "a"}]},
            "chosen: expected text, or one assistant message",
        ),
        ({**GOOD, "images": ["nowhere.png"]}, "images: expected an existing file or a data: URI, got"),
        ({**GOOD, "images": "one.png"}, "images: expected a list of paths or data: URIs, got 'one.png'"),
        ({**GOOD, "image": 1}, "image: expected a path or a data: URI, got int"),
        ({**GOOD, "image": "a.png", "images": []}, "columns: expected either image or images, got both"),
        ({**GOOD, "references": []}, "references: expected a non-empty list of texts, got []"),
        (
            {**GOOD, "negative_source": "chosen"},
            "negative_source: expected letters, digits and underscores, other than",
        ),
        ({**GOOD, "chosne": "a"}, ":2: unknown column chosne (known: prompt, chosen, rejected, images"),
        ({**GOOD, "": "a"}, ":2: unknown column '' (known: prompt, chosen, rejected, images"),
        ({**GOOD, "prompt": None}, "prompt: expected a value, got null"),
        ({**GOOD, "image": {"path": "nowhere.png"}}, "images: expected an existing file or a data: URI, got /"),
        ({**GOOD, "images": ["HTTPS://x.org/a.png"]}, "images: expected local files (download them first)"),
        ({**GOOD, "images": ["file:///a.png"]}, "images: expected paths, without file://"),
        ({**GOOD, "prompt": [], "image": "one.png"}, "prompt: expected at least 1 message, got 0"),
        (
            {**GOOD, "prompt": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "prompt: expected text or a list of messages with role and content, got [{'role'",
        ),
        ({**GOOD, "image": "x" * 5000}, "images: expected an existing file or a data: URI, got /"),
        ([1], "expected a JSON object, got list"),
        ('{"score": ' + "9" * 5000 + "}", "expected valid JSON, got Exceeds the limit"),
        ("{oops", "expected valid JSON, got Expecting"),
        ({**GOOD, "prompt": [{"role": "user", "content": "x"}]}, "prompt: expected text, as in"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, row, message):
    path = write(tmp_path, GOOD, row)
    with pytest.raises(InputError) as error:
        load_rows(path)
    assert error.value.where == f"{path}:2"
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def message(content: object, **others: object) -> list[dict]:
    return [{"role": "assistant", "content": content, **others}]


@pytest.mark.parametrize("name", ["chosen", "rejected"])
@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}], [{"type": "text"}]])
def test_a_message_without_text_is_no_answer(tmp_path, name, content):
    row = {"prompt": [{"role": "user", "content": "x"}], "chosen": message("a"), "rejected": message("b")}
    with pytest.raises(InputError, match=rf"jsonl:2: {name}: expected text, got a message without text: \[{{'role'"):
        load_rows(write(tmp_path, row, {**row, name: message(content)}))
    (loaded,) = load_rows(write(tmp_path, {**row, "rejected": message("", tool_calls=[{"name": "look"}])}))
    assert loaded.rejected[0]["tool_calls"]


def test_answers_with_the_same_text_are_alike_in_any_form(tmp_path):
    forms = ["a", message("a"), message("a", tool_calls=None), message([{"type": "text", "text": "a"}])]
    prompt = [{"role": "user", "content": "x"}]
    for chosen in forms:
        for rejected in forms:
            with pytest.raises(InputError, match="rejected: expected an answer that differs from chosen"):
                load_rows(write(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected}))


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone.jsonl: no such file"):
        load_rows(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"expected at least 1 row, got 0"):
        load_rows(write(tmp_path))


def test_all_invalid_rows_are_counted_and_the_first_ten_listed(tmp_path):
    path = write(tmp_path, GOOD, *[without("chosen")] * 11, GOOD, "{oops")
    with pytest.raises(InputError) as error:
        load_rows(path)
    first, *shown = str(error.value).split("\n")
    assert first == f"{path}: 12 of 14 rows are invalid; the first 10:"
    assert [line.split(": chosen")[0].strip() for line in shown] == [f"{path}:{line}" for line in range(2, 12)]


def test_invalid_rows_are_skipped_on_request_and_reported(tmp_path):
    path = write(tmp_path, without("chosen"), GOOD, "{oops", {**GOOD, "prompt": [{"role": "user", "content": "x"}]})
    reports: list[str] = []
    (row,) = load_rows(path, reports.append)
    assert (row.id, row.where) == (0, f"{path}:2")
    (report,) = reports
    assert report.startswith(f"{path}: 3 of 4 rows are invalid and are skipped:\n  {path}:1: chosen: expected a value")
    assert f"{path}:4: prompt: expected text, as in {path}:2, got a list of messages" in report
    load_rows(write(tmp_path, GOOD), reports.append)
    assert len(reports) == 1


def test_a_file_without_a_valid_row_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"2 of 2 rows are invalid"):
        load_rows(write(tmp_path, "{oops", "{oops"), print)


@pytest.mark.parametrize("name", ["pairs.json", "PAIRS.JSON"])
def test_a_json_file_has_an_array_of_rows(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps([GOOD, {**GOOD, "rejected": "c"}], indent=1), encoding="utf-8-sig")
    assert [(row.where, row.rejected) for row in load_rows(path)] == [(f"{path}:2", "b"), (f"{path}:7", "c")]
    path.write_text(json.dumps(GOOD) + "\n")
    assert [row.where for row in load_rows(path)] == [f"{path}:1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n]", "pairs.json: expected at least 1 row, got 0"),
        ('[\n{"prompt": "x"}]', "pairs.json:2: chosen: expected a value"),
        ("[\n%s,\n{oops]", "pairs.json:3: expected valid JSON"),
        ("[%s\n%s]", "pairs.json:1: expected ',' or ']' after the row, got '{'"),
        ("[%s,\n", "pairs.json:2: expected valid JSON"),
        ("[%s", "pairs.json:1: expected ',' or ']' after the row, got the end of the file"),
        ("[%s,\n%s]\n[%s]", "pairs.json:2: expected nothing after the array, got '[{"),
        ("[]\n\n%s", "pairs.json:1: expected nothing after the array, got '{"),
        (
            '{"data":\n[%s]}',
            "pairs.json: expected an array of rows, or a row in each line, got one object with the key",
        ),
    ],
)
def test_an_error_in_an_array_is_named(tmp_path, text, message):
    path = tmp_path / "pairs.json"
    path.write_text(text.replace("%s", json.dumps(GOOD)))
    with pytest.raises(InputError) as error:
        load_rows(path)
    assert message in str(error.value)


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"pairs.jsonl: expected UTF-8 text"):
        load_rows(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.CSV"])
def test_a_file_of_another_format_is_named_once_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"prompt,chosen,rejected\na,b,c\n\xff\n")
    with pytest.raises(
        InputError, match=r"expected JSON lines, .*of other formats, name the folder.* got a \.\w+ file"
    ):
        load_rows(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        load_rows(tmp_path / f"gone{name}")


def test_defaults_and_image_paths(tmp_path):
    (tmp_path / "one.png").touch()
    row, plain = load_rows(write(tmp_path, {**GOOD, "image": "one.png"}, GOOD))
    assert [image.name for image in row.images] == [str(tmp_path / "one.png")]
    assert (row.references, row.negative_source, row.id) == (("a",), "dataset", 0)
    assert (plain.images, plain.id) == ((), 1)


def test_an_unreadable_image_is_named_when_it_is_loaded(tmp_path):
    (tmp_path / "one.png").write_text("not an image")
    (row,) = load_rows(write(tmp_path, {**GOOD, "image": "one.png"}))
    with pytest.raises(InputError, match=r"pairs.jsonl:1: images: expected readable image files, got .*one.png"):
        row.load_images()


def test_split_is_seeded_disjoint_and_complete(rows):
    first, second = split_rows(rows, 0.75, seed=3)
    assert (len(first), len(second)) == (24, 8)
    assert sorted(row.id for row in first + second) == [row.id for row in rows]
    assert split_rows(rows, 0.75, seed=3)[1] == second
    assert split_rows(rows, 0.75, seed=4)[1] != second


def test_distinct_prompts_keeps_the_first_row_of_each(tmp_path):
    other = {**GOOD, "prompt": "another"}
    rows = load_rows(write(tmp_path, GOOD, {**GOOD, "rejected": "c"}, other))
    assert [row.id for row in distinct_prompts(rows)] == [0, 2]
