"""Complete runs through the command line: the files they write, and resuming after a kill."""

from __future__ import annotations

import csv
import json
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from cwdpo_trainer.cli import main
from cwdpo_trainer.stages.dpo import CWDPOTrainer

sys.path.insert(0, str(Path(__file__).parent))
from forked import Forks

KILLED_IN_A_SAVE = """
import os, signal, sys
import torch
from cwdpo_trainer import cli
from cwdpo_trainer.stages import dpo

save_stage_files = dpo.CWDPOTrainer._save_stage_files

def killed(self, folder):
    if self.state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    save_stage_files(self, folder)

dpo.CWDPOTrainer._save_stage_files = killed
torch.set_num_threads(1)
cli.main(["run", sys.argv[1]])
"""


KILLED_IN_A_CACHE_WRITE = """
import os, signal, sys
import torch
from cwdpo_trainer import cli
from cwdpo_trainer.models import reference_cache

add, count = reference_cache.ReferenceCache.add, 0

def killed(self, pairs):
    global count
    count += 1
    add(self, pairs)
    if count == {step}:
        with open(self._own, "r+b") as file:
            file.truncate(self._own.stat().st_size - 20)
        os.kill(os.getpid(), signal.SIGKILL)

reference_cache.ReferenceCache.add = killed
torch.set_num_threads(1)
cli.main(["run", sys.argv[1]])
"""


def results(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("timing")
    return metrics


def run_killed(forks: Forks, config: Path, step: int, program: str = KILLED_IN_A_SAVE) -> None:
    out = config.with_name("killed.txt")
    process = forks.start("-c", program.format(step=step), str(config), stdout=out, stderr=out)
    assert forks.wait(process) == -signal.SIGKILL, out.read_text()[-2000:]


def cache_lines(folder: Path) -> int:
    """Complete lines: one for each forward of the reference."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("reference_cache/*/*.jsonl"))


@pytest.fixture
def config(settings, write_config) -> Path:
    return write_config(settings)


@pytest.mark.plot
def test_a_run_writes_its_results_and_is_not_repeated(settings, write_config, task, capsys):
    settings["data"]["heldout"] = str(task / "heldout_many.jsonl")
    settings["probes"]["rows"] = 40
    config, folder = write_config(settings), Path(settings["output_dir"])
    assert main(["run", str(config)]) == 0
    metrics = results(folder)
    for label in ("after_sft", "after_cwdpo"):
        assert 0 <= metrics[label]["exact_match"] <= 1
        assert metrics[label]["cider"] >= 0
        assert metrics[label]["probes"]["step"] == 6
    delta = metrics["after_cwdpo"]["cider"] - metrics["after_sft"]["cider"]
    assert metrics["delta"]["cider"] == pytest.approx(delta)
    start = metrics["start"]
    assert 0 <= start["exact_match"] <= 1
    assert (start["captions"], start["probes"]["step"], start["probes"]["chosen_delta_logp"]) == (12, 0, 0)
    for label in ("start", "after_sft", "after_cwdpo"):
        answers = metrics[label]["answers"]
        assert answers == {"chosen": 40, "near": 20, "easy": 20, "onpolicy": answers["onpolicy"]}
    assert json.loads((folder / "cwdpo" / "heldout_answers.json").read_text()) == metrics["after_cwdpo"]["answers"]
    assert metrics["environment"]["torch"]
    with (folder / "probes.csv").open() as file:
        probes = list(csv.DictReader(file))
    assert [(row["stage"], row["step"]) for row in probes] == [(s, t) for s in ("sft", "dpo") for t in "036"]
    assert float(probes[-1]["chosen_ece"]) == metrics["after_cwdpo"]["probes"]["chosen_ece"]
    assert float(probes[3]["chosen_delta_logp"]) == 0
    assert float(probes[0]["chosen_logp"]) == start["probes"]["chosen_logp"]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 12
    share = sum(line["match_after_cwdpo"] for line in predictions) / 12
    assert share == metrics["after_cwdpo"]["exact_match"]
    assert (folder / predictions[0]["images"][0]).is_file()
    with Image.open(folder / "dynamics.png") as plot:
        assert plot.width > 1000
        assert len(plot.convert("RGB").resize((200, 80)).getcolors(maxcolors=16000)) > 50
    (finding,) = metrics["findings"]  # the high learning rate makes the model drift
    assert (finding["stage"], finding["step"], finding["name"]) == ("dpo", 6, "drift")
    training, _, table = capsys.readouterr().out.partition("after CW-DPO")
    assert training.startswith(f"run in {folder}: 24 pairs for sft, 8 pairs for dpo, 40 held-out pairs\n")
    assert training.count("found drift (stage dpo, step 3): ") == 1
    assert f"reference cache: 8 pairs, 1 KiB in {folder / 'reference_cache'}" in training
    for text in (
        "exact match of captions",
        "12 captions",
        "20 answers",
        "log p, onpolicy of stage 1",
        "log p, onpolicy of stage 2",
        "each stage has its own lines on them",
        "CIDEr",
        "ECE, chosen",
        "TV, chosen",
        f"found drift (stage dpo, step 6): {finding['evidence']}. Try this: {finding['advice']}.",
        str(folder / "dynamics.png"),
    ):
        assert text in table

    before = (folder / "metrics.json").stat().st_mtime_ns
    assert main(["run", str(config)]) == 0
    again = capsys.readouterr().out
    assert "this run is finished, nothing is left to train" in again
    assert table.strip() in again
    assert (folder / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("sharing", [pytest.param("off", marks=pytest.mark.slow), "on"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(forks, settings, write_config, tmp_path, capsys, sharing):
    settings["model"] |= {"prefix_sharing": sharing}
    if sharing == "on":  # policy and reference share frozen images too
        settings["model"]["freeze"] = ["vision_tower", "multi_modal_projector"]
    uninterrupted = write_config({**settings, "output_dir": str(tmp_path / "uninterrupted")})
    assert main(["run", str(uninterrupted)]) == 0
    config = write_config(settings)
    run_killed(forks, config, step=4)
    folder = Path(settings["output_dir"])
    assert not (folder / "checkpoints" / "dpo" / "checkpoint-4" / "COMPLETE").exists()
    assert not (folder / "cwdpo").exists()
    sft = (folder / "sft" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["run", str(config)]) == 0
    out = capsys.readouterr().out
    assert f"sft: finished before, in {folder / 'sft'}\n" in out
    assert f"dpo: resuming at step 2 of 6, from {folder / 'checkpoints/dpo/checkpoint-2'}\n" in out
    assert (folder / "sft" / "model.safetensors").stat().st_mtime_ns == sft
    assert results(folder) == results(tmp_path / "uninterrupted")
    for name in ("probes.csv", "predictions.jsonl", "cwdpo/model.safetensors", "checkpoints/dpo/negatives_0.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes(), name


@pytest.mark.parametrize("early", [False, True], ids=["last step", "stopped early"])
def test_a_stopped_stage_whose_model_is_not_saved_trains_no_further(
    settings, write_config, tmp_path, monkeypatch, early
):
    """Its last checkpoint is in the middle of an epoch, where the library's resume would take another step."""

    def interrupted(self, output_dir=None, _internal_call=False):
        if not _internal_call:  # as those of checkpoints are
            raise KeyboardInterrupt
        plain(self, output_dir, _internal_call)

    plain = CWDPOTrainer.save_model
    del settings["sft"]
    settings["dpo"] |= {"max_steps": 3, "save_steps": 3, "onpolicy_fraction": 0.0}
    if early:
        settings["dpo"] |= {"max_steps": 9, "stop_on": ["nothing_kept"], "drop_below": 0.0}
    uninterrupted = write_config({**settings, "output_dir": str(tmp_path / "uninterrupted")})
    assert main(["run", str(uninterrupted)]) == 0
    config = write_config(settings)
    with monkeypatch.context() as patch:
        patch.setattr(CWDPOTrainer, "save_model", interrupted)
        assert main(["run", str(config)]) == 130
    folder = Path(settings["output_dir"])
    assert not (folder / "cwdpo").exists()
    assert main(["run", str(config)]) == 0
    assert results(folder)["after_cwdpo"]["probes"]["step"] == 3
    assert results(folder) == results(tmp_path / "uninterrupted")
    assert (folder / "cwdpo/model.safetensors").read_bytes() == (
        tmp_path / "uninterrupted/cwdpo/model.safetensors"
    ).read_bytes()


def test_a_kill_during_a_cache_write_loses_nothing(forks, settings, write_config, tmp_path, capsys):
    """Stage 2 runs more than one epoch; the second epoch finds the log-probs of the first one, bit for bit."""
    settings["dpo"] |= {"max_steps": 5, "logp_floor": "auto", "tau": "auto", "auto_rows": 2}
    settings["data"]["sft_fraction"] = 0.6
    settings["sft"] |= {"max_steps": 1}
    uninterrupted = write_config({**settings, "output_dir": str(tmp_path / "uninterrupted")})
    assert main(["run", str(uninterrupted)]) == 0
    config = write_config(settings)
    run_killed(forks, config, step=4, program=KILLED_IN_A_CACHE_WRITE)
    folder = Path(settings["output_dir"])
    assert cache_lines(folder) == 3
    assert main(["run", str(config)]) == 0
    assert "the last line was cut off; its pairs are computed again" in capsys.readouterr().out
    assert results(folder) == results(tmp_path / "uninterrupted")
    for name in ("cwdpo/model.safetensors", "checkpoints/dpo/negatives_0.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes(), name
    # Nothing on disk was computed again.
    assert cache_lines(folder) == cache_lines(tmp_path / "uninterrupted") > 3


def test_separate_stages_equal_a_run_of_both(config, settings, write_config, tmp_path, capsys):
    assert main(["dpo", str(config)]) == 2
    assert "expected a finished stage sft" in capsys.readouterr().err
    assert main(["sft", str(config)]) == 0
    kept = {"start", "after_sft", "delta", "findings", "environment", "base_model", "data", "seed"}
    assert set(results(Path(settings["output_dir"]))) == kept
    assert main(["dpo", str(config)]) == 0
    uninterrupted = write_config({**settings, "output_dir": str(tmp_path / "uninterrupted")})
    assert main(["run", str(uninterrupted)]) == 0
    assert results(Path(settings["output_dir"])) == results(tmp_path / "uninterrupted")


def test_stage_two_alone_starts_from_the_model(settings, write_config, capsys):
    del settings["sft"]
    assert main(["run", str(write_config(settings))]) == 0
    metrics = results(Path(settings["output_dir"]))
    assert metrics["start"]["probes"]["chosen_delta_logp"] == 0
    assert metrics["after_cwdpo"]["probes"]["chosen_delta_logp"] != 0
    assert "after_sft" not in metrics


def test_a_folder_refuses_another_run(config, settings, task, capsys):
    folder = Path(settings["output_dir"])
    assert main(["sft", str(config), "sft.max_steps=1"]) == 0
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    assert main(["run", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"{folder}: sft.max_steps: " in error
    assert "expected 1, as this run was started with (or use another output_dir), got " in error
    changed = [f"data.train={task / 'heldout.jsonl'}", "sft.max_steps=1"]
    assert main(["run", str(config), *changed]) == 2
    assert f"{folder}: data.train: expected " in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_with_other_files_is_left_alone(config, settings, capsys):
    folder = Path(settings["output_dir"])
    folder.mkdir()
    (folder / "thesis.tex").touch()
    assert main(["run", str(config)]) == 2
    assert "output_dir: expected an empty folder or that of a run, got one with thesis.tex" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
