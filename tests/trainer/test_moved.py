"""A project that is moved between two stages. Paths are relative, but an adapter stores where its base model was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cwdpo_trainer.cli import main

STAGE = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "disable_tqdm": True}
SETTINGS = {
    "output_dir": "runs/x",
    "model": {"path": "model"},
    "lora": {"r": 2},
    "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
    "sft": STAGE,
    "dpo": {**STAGE, "logp_floor": -4.0, "tau": 2.0},
    "probes": {"rows": 4, "caption_rows": 2},
    "sampling": {"max_new_tokens": 3},
}


def base_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("data", ["files", "folder"])
def test_a_moved_project_continues(task, tmp_path, monkeypatch, capsys, data):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(task, old)
    settings = dict(SETTINGS)
    if data == "folder":
        for name in ("train", "heldout"):
            (old / name).mkdir()
            rows = (old / f"{name}.jsonl").read_text().replace("images/", "../images/")
            (old / name / "train.jsonl").write_text(rows)
        settings["data"] = {"train": "train", "heldout": "heldout"}
    (old / "mine.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(old)
    assert main(["sft", "mine.yaml"]) == 0
    monkeypatch.chdir(tmp_path)
    old.rename(new)
    monkeypatch.chdir(new)
    assert main(["run", "mine.yaml"]) == 0
    assert (base_of(new / "runs/x/sft"), base_of(new / "runs/x/cwdpo")) == (str(old / "model"), str(new / "model"))
    Path("runs/x").rename("runs/y")
    assert main(["run", "mine.yaml", "output_dir=runs/y"]) == 0
    assert "runs/y: this run is finished" in capsys.readouterr().out
    assert main(["eval", "runs/y", settings["data"]["heldout"], "--rows", "1"]) == 0
    assert main(["merge", "runs/y"]) == 0


def test_a_missing_base_model_is_named_with_its_adapter(task, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/model"}))
    assert main(["eval", str(folder), str(task / "heldout.jsonl")]) == 2
    expected = "expected the folder of the adapter's base model (if it has moved, make a link to it there)"
    message = f"base_model_name_or_path: {expected}, got /gone/model, which is missing\n"
    assert capsys.readouterr().err == f"cwdpo: {folder}/adapter_config.json: {message}"
