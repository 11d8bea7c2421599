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
