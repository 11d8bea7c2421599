"""A stage's checkpoints: in which order they are, which are whole, and how far training had come.

A checkpoint is a folder checkpoint-STEP. The step orders them; times of files do not, as clocks go wrong. A checkpoint
with the file COMPLETE (manifest.py) has all its files, and is whole if none of them has changed since. Resume ignores
incomplete checkpoints, so a kill during a save costs no more than the steps since the previous checkpoint.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from cwdpo_trainer.errors import InputError
from cwdpo_trainer.files import read_json
from cwdpo_trainer.manifest import COMPLETE, is_sealed, verify
from cwdpo_trainer.reporter import say

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder that the library gives the checkpoint of `step`."""
    return folder / f"checkpoint-{step}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step in `folder`, or None. Says which newer ones are damaged."""
    damaged = False
    for path in _complete(folder):
        try:
            verify(path)
            return path
        except InputError as error:
            damaged = True
            say(f"damaged checkpoint: {error}")
    if damaged:
        say(f"{folder}: no whole checkpoint is left, so the stage starts again")
    return None


def keep_newest(folder: Path, step: int, best: Path | None, limit: int | None) -> None:
    """Delete all checkpoints but `limit` of them: that of `step`, `best`, and the newest complete ones before `step`.

    Those of later steps are leftovers: training went back to a step before them. `limit` None: delete nothing.
    """
    if limit is None:
        return
    kept = {checkpoint_path(folder, step)} | ({best} if best is not None else set())
    for path in _complete(folder):
        if _step(path) < step and len(kept) < limit:
            kept.add(path)
    for path in _all(folder):
        if path not in kept:
            delete(path)


def prune(folder: Path) -> None:
    """Delete all checkpoints in `folder`."""
    for path in _all(folder):
        delete(path)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. It is incomplete from the first moment on, should the process be killed meanwhile."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def state_of(checkpoint: str | Path) -> TrainerState:
    """The trainer state that the library saved in a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def had_stopped(checkpoint: str | Path) -> bool:
    """Whether the stage had already stopped, early or at its last step, when the checkpoint was written."""
    state = read_json(Path(checkpoint) / TRAINER_STATE_NAME)
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def _all(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the latest step first. Folders with other names are not ours."""
    return sorted((path for path in folder.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()),
                  key=_step, reverse=True)  # fmt: skip


def _complete(folder: Path) -> list[Path]:
    return [path for path in _all(folder) if is_sealed(path)]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
