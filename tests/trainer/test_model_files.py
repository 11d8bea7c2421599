"""A damaged or wrong file of a model is one error that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.data.rows import read_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.loading import load_model, load_processor


def with_value(**changes: object):
    def damage(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def text(content: str):
    return lambda file: file.write_text(content)


DAMAGED = [
    ("config.json", text("[]"), "a JSON object, got a list"),
    ("config.json", text("{"), "valid JSON"),
    ("config.json", text("3"), "a JSON object, got 3"),
    ("config.json", text("[" * 200_000), "nested too deeply"),
    ("config.json", with_value(text_config={"model_type": "llama", "hidden_size": "abc"}), "the config of a model"),
    ("processor_config.json", text("[]"), "a JSON object, got a list"),
    ("tokenizer_config.json", text("[]"), "a JSON object, got a list"),
    ("tokenizer.json", text("{"), "valid JSON"),
    ("model.safetensors", truncated, "a whole safetensors file, got SafetensorError"),
    ("model.safetensors", text(""), "a whole safetensors file, got SafetensorError"),
    ("adapter_config.json", text("{}"), "base_model_name_or_path: expected a name or a path, got None"),
    ("adapter_config.json", text("{"), "valid JSON"),
    ("adapter_config.json", text("[]"), "a JSON object, got list"),
]


def load(path: str) -> None:
    load_processor(path)
    load_model(ModelArguments(path), path, None)


@pytest.mark.parametrize(("name", "damage", "expected"), DAMAGED)
def test_a_damaged_file_is_named(task, tmp_path, name, damage, expected):
    folder = tmp_path / "model"
    shutil.copytree(task / "model", folder)
    damage(folder / name)
    with pytest.raises(InputError) as error:
        load(str(folder))
    assert str(error.value).startswith(f"{folder / name}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_file_of_an_adapter_is_named(task, tmp_path, name):
    lora = LoraArguments(target_modules=["q_proj"])
    path = str(task / "model")
    load_model(ModelArguments(path), path, lora).save_pretrained(tmp_path)
    truncated(tmp_path / name)
    for place, start in ((str(tmp_path), None), (path, LoraArguments(adapter=str(tmp_path)))):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: "):
            load_model(ModelArguments(path), place, start)


def test_options_of_lora_that_do_not_fit_are_one_error(task):
    path = str(task / "model")
    with pytest.raises(InputError, match="config: lora: expected options that fit the model"):
        load_model(ModelArguments(path), path, LoraArguments(target_modules="(["))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_check_counts_a_damaged_file_once(settings, write_config, task, tmp_path, capsys, name):
    shutil.copytree(task / "model", tmp_path / "model")
    truncated(tmp_path / "model" / name)
    settings["model"]["path"] = "model"
    assert main(["check", str(write_config(settings))]) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / 'model' / name}: expected " in out
    assert "InputError" not in out
    errors = [line for line in out.splitlines() if line.startswith("error ")]
    assert len([line for line in errors if "heldout_pairs_in_train" not in line]) == 1, errors


def test_a_run_can_be_repeated_after_a_failed_start(settings, write_config, task, tmp_path, capsys):
    """Until there is a checkpoint, a corrected config may continue in the same folder."""
    shutil.copytree(task / "model", tmp_path / "model")
    truncated(tmp_path / "model" / "model.safetensors")
    settings["model"]["path"] = "model"
    settings["dpo"] |= {"hub_token": "hf_secret"}
    path = write_config(settings)
    assert main(["sft", str(path)]) == 2
    assert f"{tmp_path}/model/model.safetensors: expected a whole safetensors file" in capsys.readouterr().err
    run = Path(settings["output_dir"])
    assert not (run / "run.json").exists()
    shutil.copy(task / "model" / "model.safetensors", tmp_path / "model")
    (run / "run.json").write_text(json.dumps({"config": {"seed": 9}, "inputs": {}}))  # stopped in its first steps
    assert main(["sft", str(path), "sft.max_steps=2"]) == 0
    assert json.loads((run / "run.json").read_text())["config"]["sft"]["max_steps"] == 2
    for file in run.rglob("*"):
        assert not (file.is_file() and b"hf_secret" in file.read_bytes()), file
    assert main(["sft", str(path), "sft.max_steps=3"]) == 2  # now there is something to lose
    assert "expected 2, as this run was started with (or use another output_dir), got 3" in capsys.readouterr().err


def test_nested_json_is_a_bad_row(tmp_path):
    row = '{"prompt": "x", "chosen": "a", "rejected": "b"}\n'
    deep = '{"prompt": "x", "chosen": "a", "rejected": "c", "references": %s}\n' % ("[" * 900 + "]" * 900)
    (tmp_path / "rows.jsonl").write_text(row + "[" * 200_000 + "\n" + deep)
    rows, errors = read_rows(open_source(tmp_path / "rows.jsonl"))
    assert len(rows) == 1
    assert [error.where for error in errors] == [f"{tmp_path}/rows.jsonl:{line}" for line in (2, 3)]
    assert "valid JSON, got brackets that are nested too deeply" in str(errors[0])
