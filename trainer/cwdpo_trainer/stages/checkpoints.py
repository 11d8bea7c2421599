"""A stage's checkpoints: which are complete, and how far training had come.

A checkpoint is complete if its folder holds the file COMPLETE. `mark_complete` writes it after all other files, and
`is_complete` looks for it; no other code does either. Resume ignores incomplete checkpoints, so a kill during a save
costs no more than the steps since the previous checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from cwdpo_trainer.files import read_json

COMPLETE = "COMPLETE"


def mark_complete(checkpoint: Path) -> None:
    """Declare a checkpoint complete. One process calls this, once all processes have written their files."""
    (checkpoint / COMPLETE).touch()


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / COMPLETE).is_file()


def newest_checkpoint(folder: Path) -> str | None:
    """The complete checkpoint of the latest step in `folder`, or None. Names are checkpoint-STEP."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if is_complete(path)}
    return str(steps[max(steps)]) if steps else None


def state_of(checkpoint: str) -> TrainerState:
    """The trainer state that the library saved in a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def had_stopped(checkpoint: str) -> bool:
    """Whether the stage had already stopped, early or at its last step, when the checkpoint was written."""
    state = read_json(Path(checkpoint) / TRAINER_STATE_NAME)
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])
