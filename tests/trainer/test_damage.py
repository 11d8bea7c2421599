"""Damaged and changed files of a run: one error with the file's name, and never another result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cwdpo_trainer.cli import main
from cwdpo_trainer.stages import dpo


@pytest.fixture(scope="module")
def interrupted(task, tmp_path_factory):
    """A folder with task/, config.yaml and run/: a run stopped at step 5 of stage 2, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(task, folder / "task")
    stage = "{max_steps: 6, per_device_train_batch_size: 4, save_steps: 2, eval_strategy: 'no', disable_tqdm: true}"
    (folder / "config.yaml").write_text(
        f"""output_dir: {folder}/run
checkpoints: keep
model: {{path: task/model}}
data: {{train: task/train.jsonl, heldout: task/heldout.jsonl}}
sft: {stage}
dpo: {stage[:-1]}, onpolicy_fraction: 0.5}}
probes: {{rows: 4, caption_rows: 4}}
sampling: {{max_new_tokens: 6}}
"""
    )
    plain = dpo.CWDPOTrainer._loss_output

    def stopped(self, model, batch):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return plain(self, model, batch)

    torch.set_num_threads(1)
    dpo.CWDPOTrainer._loss_output = stopped
    try:
        assert main(["run", str(folder / "config.yaml")]) == 130
    finally:
        dpo.CWDPOTrainer._loss_output = plain
    return folder


@pytest.fixture
def run(interrupted, tmp_path):
    """A copy of the interrupted run that may be damaged, and its config file."""
    shutil.copytree(interrupted, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"
    config.write_text(config.read_text().replace(f"{interrupted}/run", f"{tmp_path}/copy/run"))
    return tmp_path / "copy"


def rerun(run, capsys, command="run"):
    """The exit status and what was printed to stderr; stdout is checked by the caller."""
    capsys.readouterr()
    status = main([command, str(run / "config.yaml")])
    return status, capsys.readouterr()


def change_weights(path):
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def overwrite_image(run):
    image = next((run / "task" / "images").glob("*.png"), None) or next((run / "task").rglob("*.png"))
    other = next(path for path in (run / "task").rglob("*.png") if path.read_bytes() != image.read_bytes())
    stat = image.stat()
    shutil.copyfile(other, image)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def put(path, content, offset=0):
    """Overwrite what is at `offset`; append if it is -1."""
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END) if offset < 0 else file.seek(offset)
        file.write(content)


def write_metrics(run, text):
    (run / "run" / "metrics.json").write_text(text)


STOPPED = {
    "the base model's weights": (
        lambda run: change_weights(run / "task/model/model.safetensors"),
        "run: inputs.model.model.safetensors: expected",
    ),
    "the base model's tokenizer": (
        lambda run: put(run / "task/model/tokenizer.json", b" ", -1),
        "run: inputs.model.tokenizer.json: expected",
    ),
    "an image": (overwrite_image, "inputs.images."),
    "the training data": (lambda run: put(run / "task/train.jsonl", b"\n", -1), "run: inputs.data.train: expected"),
    "run.json cut": (lambda run: os.truncate(run / "run/run.json", 40), "run/run.json: expected valid JSON"),
    "run.json of another shape": (lambda run: (run / "run/run.json").write_text("[]"), "run.json: expected a JSON obj"),
    "run.json without a config": (lambda run: (run / "run/run.json").write_text("{}"), "run.json: config: expected"),
    "metrics.json cut": (lambda run: write_metrics(run, '{"after'), "metrics.json: expected valid JSON"),
    "metrics.json of another shape": (lambda run: write_metrics(run, "3"), "metrics.json: expected a JSON object"),
    "metrics.json without probes": (
        lambda run: write_metrics(run, '{"after_sft": {"cider": 1.0}, "after_cwdpo": {}}'),
        "metrics.json: after_",
    ),
    "the model of stage 1": (lambda run: change_weights(run / "run/sft/model.safetensors"), "sft/model.safetensors: e"),
    "the model of stage 1 is cut": (lambda run: os.truncate(run / "run/sft/model.safetensors", 99), "sft/model.safe"),
    "its tokenizer": (lambda run: (run / "run/sft/tokenizer.json").write_text("{"), "sft/tokenizer.json: expected"),
    "its list of files": (lambda run: (run / "run/sft/COMPLETE").write_text("{"), "sft/COMPLETE: expected valid JSON"),
    "the log of negatives": (
        lambda run: put(run / "run/checkpoints/dpo/negatives_0.jsonl", b"#"),
        "negatives_0.jsonl:1: expec",
    ),
    "the log of negatives, not as text": (
        lambda run: put(run / "run/checkpoints/dpo/negatives_0.jsonl", b"\xff"),
        "negatives_0.jsonl: exp",
    ),
}


@pytest.mark.parametrize("kind", STOPPED)
def test_a_changed_file_stops_the_run_with_one_error_that_names_it(kind, run, capsys):
    damage, message = STOPPED[kind]
    damage(run)
    status, printed = rerun(run, capsys)
    assert status == 2
    assert printed.err.startswith("cwdpo: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not (run / "run" / "cwdpo").exists()


def test_checkpoints_that_are_damaged_or_not_ours_are_passed_over(run, capsys, monkeypatch):
    """The optimizer is missing in the newest one. Training goes on from the one before, which may have any clock."""
    stage = run / "run/checkpoints/dpo"
    (stage / "checkpoint-4/optimizer.pt").unlink()
    shutil.copytree(stage / "checkpoint-4", stage / "checkpoint-8.bak")
    os.utime(stage / "checkpoint-2", (2e9, 2e9))
    steps = []
    plain = dpo.CWDPOTrainer._loss_output
    monkeypatch.setattr(
        dpo.CWDPOTrainer,
        "_loss_output",
        lambda self, *args: (steps.append(self.state.global_step), plain(self, *args))[1],
    )
    status, printed = rerun(run, capsys)
    assert status == 0
    assert f"damaged checkpoint: {stage}/checkpoint-4/optimizer.pt: expected the " in printed.out
    assert f"dpo: resuming at step 2 of 6, from {stage}/checkpoint-2\n" in printed.out
    assert steps == [2, 3, 4, 5]
    assert sorted(path.name for path in stage.glob("checkpoint-*")) == [
        "checkpoint-4", "checkpoint-6", "checkpoint-8.bak"
    ]  # fmt: skip
    assert main(["probe", str(run / "run"), str(run / "task/heldout.jsonl"), "--rows", "2"]) == 0
    capsys.readouterr()
    change_weights(run / "run/cwdpo/model.safetensors")
    assert main(["probe", str(run / "run"), str(run / "task/heldout.jsonl"), "--rows", "2"]) == 2
    assert "cwdpo/model.safetensors: expected the content that was saved" in capsys.readouterr().err


def test_check_finds_what_a_run_would_refuse(run, capsys):
    command = ["check", str(run / "config.yaml"), "--no-model", "--rows", "2"]
    main(command)
    assert "folder_of_another_run" not in capsys.readouterr().out
    overwrite_image(run)
    assert main(command) == 1
    assert "folder_of_another_run" in capsys.readouterr().out


def test_files_left_by_a_killed_process_do_not_block_a_new_run(run, capsys, monkeypatch):
    """A kill while run.json is written leaves its temporary file."""
    shutil.rmtree(run / "run")
    (run / "run").mkdir()
    (run / "run" / ".run.4711.json").write_text("{")
    (run / "run" / "run.lock").touch()

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cwdpo_trainer.run.newest_checkpoint", stopped)
    assert rerun(run, capsys)[0] == 130
    assert json.loads((run / "run" / "run.json").read_text())["inputs"]["model"]
    assert not list((run / "run").glob(".run.*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
def test_a_damaged_base_model_is_one_error(name, run, capsys):
    path = run / "task/model" / name
    if not path.exists():
        path = run / "task/model/processor_config.json"
    os.truncate(path, path.stat().st_size // 2)
    shutil.rmtree(run / "run")
    status, printed = rerun(run, capsys)
    assert status == 2
    assert printed.err.startswith(f"cwdpo: {path}: expected ")
    assert printed.err.count("\n") == 1


def test_a_file_in_place_of_a_folder_is_one_error(run, capsys):
    shutil.rmtree(run / "run/reference_cache")
    (run / "run/reference_cache").touch()
    status, printed = rerun(run, capsys)
    assert status == 2
    assert "reference_cache" in printed.err
    assert printed.err.count("\n") == 1


def test_interruption_is_one_line(run, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cwdpo_trainer.run.RunInputs.load", interrupt)
    status, printed = rerun(run, capsys)
    assert (status, printed.err) == (130, "cwdpo: interrupted (an interrupted run continues with the same command)\n")


def test_a_full_disk_is_one_line_that_names_the_checkpoint(run, capsys, monkeypatch):
    """torch reports a full disk as an error about positions in its file."""

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr("transformers.trainer.torch.save", full)
    status, printed = rerun(run, capsys)
    assert status == 2
    assert printed.err.startswith(f"cwdpo: {run}/run/checkpoints/dpo/checkpoint-6: expected free space")
    assert printed.err.count("\n") == 1


def test_a_read_only_folder_is_one_line(run, capsys, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, printed = rerun(run, capsys)
    assert status == 2
    assert (
        printed.err
        == f"cwdpo: {run}/run: expected a file or folder that can be used, got PermissionError: Permission denied\n"
    )
