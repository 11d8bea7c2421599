"""A stage's log history, which `transformers` keeps in trainer_state.json, as its probes and its training logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Entry = dict[str, Any]
History = list[Entry]
PREFIX = "eval_"  # the library's, of all that an evaluation logs


def probe_entries(history: Iterable[Mapping[str, Any]]) -> History:
    """The probes of a history in the order of steps, without the prefix eval_; a step's last one counts."""
    by_step = {
        entry["step"]: {key.removeprefix(PREFIX): value for key, value in entry.items() if key.startswith(PREFIX)}
        for entry in history
        if f"{PREFIX}chosen_logp" in entry
    }
    return [{"step": step, **by_step[step]} for step in sorted(by_step)]


def training_entries(history: Iterable[Mapping[str, Any]]) -> History:
    """The logs of training in the order of steps: the loss and the figures of its batches."""
    return sorted((dict(entry) for entry in history if "loss" in entry), key=lambda entry: entry["step"])


def sets_of(probe: Mapping[str, Any]) -> list[str]:
    """The names of the sets of answers that a probe measured: chosen, then the negatives."""
    suffix = "_delta_logp"
    return [key.removesuffix(suffix) for key in probe if key.endswith(suffix)]
