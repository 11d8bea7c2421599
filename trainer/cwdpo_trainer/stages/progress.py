"""What a stage shows while it trains, and how long it has taken.

The progress bar prints the main metrics only. A probe has about sixty; all of them are in the log.
"""

from __future__ import annotations

import time
from typing import Any

from transformers.trainer_callback import ExportableState, ProgressCallback, TrainerCallback, TrainerState

from cwdpo_trainer.reporter import say

BAR_METRICS = (
    "loss", "margin", "accuracy", "cooling_weight", "chosen_nll", "kept", "onpolicy", "learning_rate",
    "logp_floor", "tau", "eval_chosen_mean_logp", "eval_chosen_delta_logp", "eval_chosen_ece", "eval_chosen_tv",
)  # fmt: skip


class CompactProgress(ProgressCallback):
    """The library's progress bar. Of each log entry it prints the metrics in `BAR_METRICS`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.training_bar is not None):
            return
        metrics = [f"{name.removeprefix('eval_')} {logs[name]:.4g}" for name in BAR_METRICS if logs and name in logs]
        if metrics:
            kind = "probe" if any(name.startswith("eval_") for name in logs) else "train"
            say(f"{kind} {state.global_step:>5}  " + "  ".join(metrics))


class TrainingClock(TrainerCallback, ExportableState):
    """The seconds that a stage has trained. Checkpoints keep them, so those before a kill count as well."""

    def __init__(self) -> None:
        self.before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self._started is None else time.monotonic() - self._started)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.before, self._started = self.seconds, None

    def state(self) -> dict[str, Any]:
        """What the library saves, and sets again when a stage resumes."""
        return {"args": {}, "attributes": {"before": self.seconds}}

    @classmethod
    def saved_seconds(cls, state: TrainerState) -> float:
        """The seconds in the state of a checkpoint; 0 in one of an earlier version."""
        callbacks: Any = state.stateful_callbacks or {}  # by name
        return float(callbacks.get(cls.__name__, {}).get("attributes", {}).get("before", 0.0))
