"""Splits a stage's log history (trainer_state.json of `transformers`) into probes and training logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Entry = dict[str, Any]
History = list[Entry]
PREFIX = "eval_"  # the library's prefix for the metrics of an evaluation


def probe_entries(log_history: Iterable[Mapping[str, Any]]) -> History:
    """The probes by step, without the prefix eval_. Of several probes at one step, only the last is returned."""
    by_step = {
        entry["step"]: {key.removeprefix(PREFIX): value for key, value in entry.items() if key.startswith(PREFIX)}
        for entry in log_history
        if f"{PREFIX}chosen_logp" in entry
    }
    return [{"step": step, **by_step[step]} for step in sorted(by_step)]


def training_entries(log_history: Iterable[Mapping[str, Any]]) -> History:
    """The training logs by step: the loss and the metrics of its batches."""
    return sorted((dict(entry) for entry in log_history if "loss" in entry), key=lambda entry: entry["step"])


def left_out_share(log_history: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of a stage's pairs that were left out of the loss; None if the stage did not log it.

    A log is the mean over the batches since the log before, so it counts as many times as it has steps.
    """
    before, steps, left_out = 0, 0, 0.0
    for entry in training_entries(log_history):
        if "kept" in entry:
            left_out += (1 - entry["kept"]) * (entry["step"] - before)
            steps += entry["step"] - before
        before = entry["step"]
    return left_out / steps if steps else None


def moved_share(log_history: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of the trained weights that a stage changed; None if it did not log it, as only
    stages with low-precision weights do."""
    return next((entry["weights_moved"] for entry in reversed(list(log_history)) if "weights_moved" in entry), None)


def sets_of(probe: Mapping[str, Any]) -> list[str]:
    """The names of a probe's sets of answers: chosen first, then the negatives."""
    suffix = "_delta_logp"
    return [key.removesuffix(suffix) for key in probe if key.endswith(suffix)]
