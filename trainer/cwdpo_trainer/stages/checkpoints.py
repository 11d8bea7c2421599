"""The library's checkpoints of a stage: which of them are whole, and how far they had come."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

COMPLETE = "COMPLETE"  # in a checkpoint folder: everything of it was written


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that was not is written anew in its turn."""
    steps = {int(path.parent.name.rpartition("-")[2]): path.parent for path in folder.glob(f"*/{COMPLETE}")}
    return str(steps[max(steps)]) if steps else None


def state_of(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def had_ended(checkpoint: str) -> bool:
    """Whether the stage had stopped, at its last step or early, when the checkpoint was written."""
    return bool(state_of(checkpoint).stateful_callbacks["TrainerControl"]["args"]["should_training_stop"])
