"""Rows that a run cannot train on are found before it starts, and skipped on request, by `check` and by `run`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image

from cwdpo_trainer.cli import main
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.rows import load_rows
from cwdpo_trainer.data.screening import bad_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_processors import PROCESSORS

# PaliGemma's processor makes labels (which the collator drops) in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)
GOOD = {"prompt": "<image> describe", "chosen": "a red square", "rejected": "a blue square"}


def truncated(folder: Path) -> str:
    Image.effect_noise((64, 64), 90).save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:2000])
    return "truncated.png"


def not_a_number(folder: Path) -> str:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "nan.tiff")
    return "nan.tiff"


# Column values of a bad row, and what the error says. A function makes an image in a folder, and returns its name.
BAD = {
    "truncated image": ({"images": [truncated]}, "images: expected readable image files"),
    "NaN pixels": ({"images": [not_a_number]}, "expected finite pixels, got NaN"),
    "two placeholders": ({"prompt": "<image> <image> describe"}, "2 <image> in the prompt, 1 images"),
    "no placeholder": ({"prompt": "describe"}, "0 <image> in the prompt, 1 images"),
    "no image": ({"images": []}, "1 <image> in the prompt, 0 images"),
    "image token in an answer": ({"rejected": "a <image> square"}, "<image> in rejected 'a <image> square'"),
    "lone surrogate": ({"chosen": "a \ud83d square"}, r"chosen: expected Unicode text, got half of a surrogate pair"),
    "lone surrogate in a path": ({"images": ["\udc80.png"]}, r"images: expected Unicode text, got half of"),
    "lone surrogate in a name": ({"\ud83d": 1}, r"\ud83d: expected Unicode text, got half of a surrogate pair"),
    "null image": ({"images": [None]}, "images: expected a list of paths or data: URIs, got [None]"),
    "list of lists": ({"images": [["images/train0.png"]]}, "images: expected a list of paths or data: URIs"),
    "folder": ({"images": ["images"]}, "images: expected an existing file"),
    "URL": ({"images": ["https://example.org/a.png"]}, "images: expected local files (download them first)"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, task) -> Path:
    """A copy of the task's folder, for tests that change its rows. Its held-out pairs are not in train."""
    shutil.copytree(task, tmp_path / "task")
    path = tmp_path / "task" / "heldout.jsonl"
    path.write_text(path.read_text().replace("describe", "describe the square"))
    return tmp_path / "task"


def plant(folder: Path, line: int, values: dict) -> None:
    """Change columns of the row on a line of train.jsonl."""
    values = {key: [one(folder) if callable(one) else one for one in value] if key == "images" else value
              for key, value in values.items()}  # fmt: skip
    path = folder / "train.jsonl"
    rows = path.read_text().splitlines()
    rows[line - 1] = json.dumps({**json.loads(rows[line - 1]), **values})
    path.write_text("\n".join(rows))


@pytest.fixture
def command(folder, settings, write_config):
    """A function that returns the arguments of a short run of stage 2, or of its check, on the rows in `folder`."""
    del settings["sft"]
    settings["dpo"] |= {"max_steps": 1, "eval_steps": 1, "onpolicy_fraction": 0.0}
    settings["data"] = {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")}
    settings["probes"] = {"rows": 2, "caption_rows": 1}
    return lambda name, *overrides: [name, str(write_config(settings)), *overrides]


@pytest.mark.parametrize("name", ["truncated image", "two placeholders", "lone surrogate", "null image"])
def test_a_bad_row_stops_a_run_and_its_check(name, folder, command, capsys):
    values, message = BAD[name]
    plant(folder, 18, values)
    assert main(command("run")) == 2
    printed = capsys.readouterr().err
    assert f"cwdpo: {folder}/train.jsonl:18: " in printed
    assert message in printed
    assert main(command("check", "--no-model")) == 1
    assert "train.jsonl:18: " in capsys.readouterr().out
    assert main(command("check", "--no-model", "data.skip_bad_rows=true")) == 0
    printed = capsys.readouterr().out
    assert "train.jsonl:18: " in printed
    assert "data.skip_bad_rows is set: the run skips them" in printed


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_skipped_and_counted(folder, command, capsys, workers):
    for line, (values, _) in enumerate(BAD.values(), start=5):
        plant(folder, line, values)
    overrides = ("data.skip_bad_rows=true", f"dpo.dataloader_num_workers={workers}", "dpo.max_steps=2")
    assert main(command("run", *overrides)) == 0
    printed = capsys.readouterr().out
    read = sum("Unicode" in message or "images: expected " in message for _, message in BAD.values()) - 1
    assert f"train.jsonl: {read} of 32 rows are invalid and are skipped" in printed
    assert f"train.jsonl: {len(BAD) - read} of {32 - read} rows are invalid and are skipped" in printed
    assert f"{32 - len(BAD)} pairs for dpo" in printed
    for line, (_, message) in enumerate(BAD.values(), start=5):
        (found,) = [text for text in printed.splitlines() if f"train.jsonl:{line}: " in text]
        assert message in found
    assert main(command("run", *overrides)) == 0  # finished: the digests of the images are the same


def test_a_measurement_skips_bad_rows_as_its_run_does(folder, command, settings, capsys):
    overrides = ("data.skip_bad_rows=true", "data.max_length=40")
    assert main(command("run", *overrides)) == 0
    plant(folder, 3, {"images": [truncated]})
    for name in ("probe", "eval"):
        assert main([name, settings["output_dir"], str(folder / "train.jsonl"), "--rows", "4"]) == 0
        printed = capsys.readouterr().out
        assert "1 of 32 rows are invalid and are skipped" in printed
        assert "train.jsonl:3: images: expected readable image files" in printed


def test_all_bad_rows_are_an_error(folder, command, capsys):
    for line in range(1, 33):
        plant(folder, line, {"prompt": "<image> <image> describe"})
    assert main(command("run", "data.skip_bad_rows=true")) == 2
    assert "train.jsonl: 32 of 32 rows are invalid; the first 10:" in capsys.readouterr().err


def test_a_repeated_key_is_a_bad_row(tmp_path):
    """At any depth, in both kinds of files. Rows after it are read."""
    good = json.dumps({**GOOD, "prompt": "describe"})
    repeated = '{"chosen": "a", "chosen": "b", "prompt": "p", "rejected": "r"}'
    nested = '{"prompt": [{"role": "user", "role": "system", "content": "x"}], "chosen": "a", "rejected": "b"}'
    (tmp_path / "rows.jsonl").write_text("\n".join([good, repeated, nested, good]))
    (tmp_path / "rows.json").write_text("[\n" + ",\n".join([good, repeated, nested, good]) + "\n]")
    for name, line in (("rows.jsonl", 2), ("rows.json", 3)):
        reports: list[str] = []
        assert len(load_rows(tmp_path / name, reports.append)) == 2
        (report,) = reports
        assert f"{name}:{line}: expected each key once in an object, got 'chosen' more than once" in report
        assert f"{name}:{line + 1}: expected each key once in an object, got 'role' more than once" in report


PARTS = [{"type": "image"}, {"type": "text", "text": "describe"}]


@pytest.mark.parametrize(
    ("part", "images", "message"),
    [
        ({"type": "image", "image": "a.png"}, [], "prompt: expected images in the column images"),
        ({"type": "image", "url": "https://x.org/a.png"}, [], "prompt: expected images in the column images"),
        ({"type": "image", "image": "b.png"}, ["a.png"], "got another image in a message part"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, [], "message parts of type text or image"),
        ({"type": "video", "video": "a.mp4"}, [], "message parts of type text or image"),
        ({"type": 1}, [], "prompt: expected text or a list of messages"),
    ],
)
def test_an_image_in_a_message_part_must_be_in_the_column(tmp_path, part, images, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"prompt": [{"role": "user", "content": [part, PARTS[1]]}], "chosen": "a", "rejected": "b", "images": images}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=f"rows.jsonl:1: .*{message}"):
        load_rows(tmp_path / "rows.jsonl")


def test_parts_that_name_the_images_of_the_column_are_accepted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = [{"type": "image", "image": "a.png"}, PARTS[1]]
    row = {"prompt": [{"role": "user", "content": content}], "chosen": "a", "rejected": "b", "images": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert len(load_rows(tmp_path / "rows.jsonl")[0].images) == 1


def test_an_answer_has_text_alone(tmp_path):
    row = {"prompt": [{"role": "user", "content": PARTS[1:]}], "chosen": [{"role": "assistant", "content": PARTS}],
           "rejected": "b"}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"rows.jsonl:1: chosen: expected message parts of type text, got "):
        load_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "images",
    [List(datasets.Image()), List(Value("binary")), List({"bytes": Value("binary"), "path": Value("string")})],
    ids=["images", "bytes", "structs"],
)
def test_null_images_in_parquet_are_bad_rows(tmp_path, monkeypatch, images):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    image = data if images.feature == Value("binary") else {"bytes": data, "path": None}
    features = Features({**{name: Value("string") for name in GOOD}, "images": images})
    rows = [{**GOOD, "images": cell} for cell in ([image], [None], [image, None], None, [image])]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    reports: list[str] = []
    valid = load_rows(open_source("set", tmp_path), reports.append)
    assert [len(row.images) for row in valid] == [1, 0, 1]
    (report,) = reports
    for index in (1, 2):
        assert f"set:train[{index}]: images: expected an image in each element of the list, got null" in report


@pytest.mark.parametrize("name", PROCESSORS)
def test_bad_rows_of_every_processor_class(name, tmp_path):
    """Qwen's processor refuses sides of more than 200 : 1, PaliGemma's prompts without an image."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (2000, 4)).save(tmp_path / "thin.png")
    two = {"prompt": "<image> <image> describe", "images": ["a.png"]}
    cells = [{"images": ["a.png"]}, two, {"images": ["thin.png"]}, {"prompt": "describe"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**GOOD, **cell}) for cell in cells))
    errors = bad_rows(load_rows(tmp_path / "rows.jsonl"), PairCollator(PROCESSORS[name]()))
    assert list(errors) == {"qwen2_5_vl": [1, 2], "paligemma": [1, 3]}.get(name, [1])
    assert all(str(error).startswith(f"{tmp_path}/rows.jsonl:{index + 1}: ") for index, error in errors.items())


def test_chat_rows_are_screened_as_the_template_renders_them(folder, collator):
    processor = type(collator.processor).from_pretrained(folder / "model")
    processor.chat_template = TEMPLATE
    content = [{"type": "image"}, {"type": "text", "text": "<image> describe"}]
    row = {**GOOD, "prompt": [{"role": "user", "content": content}], "images": ["images/train0.png"]}
    answers = {name: [{"role": "assistant", "content": [{"type": "text", "text": row[name]}]}]
               for name in ("chosen", "rejected")}  # fmt: skip
    (folder / "rows.jsonl").write_text(json.dumps({**row, **answers}))
    errors = bad_rows(load_rows(folder / "rows.jsonl"), PairCollator(processor))
    assert "2 <image> in the prompt, 1 images" in str(errors[0])
