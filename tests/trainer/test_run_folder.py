"""The run folder: one process at a time trains in it, and a killed process leaves no lock behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwdpo_trainer import run_folder
from cwdpo_trainer.cli import main
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.run_folder import RunFolder

HOLDER = """
import sys
from pathlib import Path
from cwdpo_trainer.run_folder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
folder.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(settings, monkeypatch) -> Path:
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.2)
    return Path(settings["output_dir"])


@pytest.fixture
def holder(folder) -> Iterator[subprocess.Popen]:
    """Another process, which holds the lock of the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_in_the_same_folder_is_refused(settings, write_config, folder, holder, capsys):
    assert main(["run", str(write_config(settings))]) == 2
    assert f"cwdpo: {folder}: output_dir: expected a folder that no other process" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_killed_process_leaves_no_lock(folder, holder):
    with pytest.raises(InputError, match="no other process"):
        RunFolder(folder).acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    RunFolder(folder).acquire()  # raises if it is refused


def test_a_released_folder_can_be_locked_again(folder):
    first = RunFolder(folder)
    first.acquire()
    with pytest.raises(InputError, match="no other process"):
        RunFolder(folder).acquire()
    first.release()
    second = RunFolder(folder)
    second.acquire()
    first.release()  # nothing is held: no error


@pytest.mark.parametrize("moment", ["freeze_reference", "write_record", "train"])
def test_a_run_killed_before_its_first_step_does_not_lock_its_folder(settings, write_config, monkeypatch, moment):
    """Another config can use the folder."""
    del settings["sft"]
    settings["dpo"] |= {"max_steps": 2, "disable_tqdm": True}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    target = {
        "freeze_reference": "cwdpo_trainer.run.freeze_reference",
        "write_record": "cwdpo_trainer.run_folder.RunFolder.write_record",
        "train": "cwdpo_trainer.stages.dpo.CWDPOTrainer.training_step",
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(target, killed)
        assert main(["run", str(write_config(settings))]) == 130
    assert main(["run", str(write_config(settings)), "dpo.beta=0.2", "seed=5"]) == 0


@pytest.mark.parametrize("checkpoints", [None, "keep", "prune"])
def test_checkpoints_of_a_finished_stage_are_pruned_unless_kept(settings, write_config, checkpoints):
    settings["lora"] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    settings["sft"] |= {"max_steps": 2}
    settings["dpo"] |= {"max_steps": 2}
    if checkpoints is not None:
        settings["checkpoints"] = checkpoints
    assert main(["run", str(write_config(settings))]) == 0
    run = Path(settings["output_dir"])
    left = sorted(str(path.relative_to(run)) for path in run.glob("checkpoints/*/checkpoint-*"))
    kept = ["checkpoints/dpo/checkpoint-2", "checkpoints/sft/checkpoint-2"]
    assert left == (kept if checkpoints == "keep" else [])
    assert not list(run.glob("checkpoints/*/*/README.md"))  # peft's is empty
    assert (run / "checkpoints/dpo/negatives_0.jsonl").is_file()
    if checkpoints == "keep":  # what is kept is no part of the run: the same run goes on, and prunes
        (run / "metrics.json").unlink()
        assert main(["run", str(write_config(settings)), "checkpoints=prune"]) == 0
        assert not list(run.glob("checkpoints/*/checkpoint-*"))


def test_what_to_do_with_checkpoints_is_checked(settings, write_config, capsys):
    assert main(["run", str(write_config(settings)), "checkpoints=all"]) == 2
    assert "checkpoints: expected keep or prune, got 'all' (str)" in capsys.readouterr().err
