"""Splits a stage's log history (trainer_state.json of `transformers`) into probes and training logs.

A `StageHistory` is what the doctor reads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from cwdpo_kernels import CoolingWeighted

Entry = dict[str, Any]
History = list[Entry]
PREFIX = "eval_"  # the library's prefix for the metrics of an evaluation
RECENT = 5  # training logs that are averaged
# Means over n answers vary by their standard deviation over sqrt(n) from one sample of rows to another: 22 % of it at
# n = 20, 41 % at n = 6. From 20 on, one odd answer is at most 5 % of a mean.
MIN_ANSWERS = 20


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


def left_out_share(log_history: Iterable[Mapping[str, Any]]) -> tuple[float, int] | None:
    """The share of a stage's pairs that were left out of the loss, and over how many steps; None if the stage did not
    log it.

    A log is the mean over the batches since the log before, so it counts as many times as it has steps.
    """
    before, steps, left_out = 0, 0, 0.0
    for entry in training_entries(log_history):
        if "kept" in entry:
            left_out += (1 - entry["kept"]) * (entry["step"] - before)
            steps += entry["step"] - before
        before = entry["step"]
    return (left_out / steps, steps) if steps else None


def moved_share(log_history: Iterable[Mapping[str, Any]]) -> tuple[float, int] | None:
    """The share of the trained weights that a stage changed, and how many it trained; None if it did not log it, as
    only stages with low-precision weights do."""
    logged = [entry for entry in log_history if "weights_moved" in entry and "trained_weights" in entry]
    return (logged[-1]["weights_moved"], logged[-1]["trained_weights"]) if logged else None


def sets_of(probe: Mapping[str, Any]) -> list[str]:
    """The names of a probe's sets of answers: chosen first, then the negatives."""
    suffix = "_delta_logp"
    return [key.removesuffix(suffix) for key in probe if key.endswith(suffix)]


@dataclass(frozen=True)
class StageHistory:
    """What a stage ("sft" or "dpo") has logged: its probes and training logs by step, its settings by name, and the
    number of held-out answers by set.

    To compare two models without training, the probes are the reference's and the model's, and there are no logs.
    """

    stage: str
    probes: History
    logs: History
    settings: Mapping[str, Any]
    answers: Mapping[str, int]

    @classmethod
    def of(
        cls, stage: str, log_history: History, settings: Mapping[str, Any], answers: Mapping[str, int]
    ) -> StageHistory:
        return cls(stage, probe_entries(log_history), training_entries(log_history), settings, answers)

    def until(self, count: int) -> StageHistory:
        """The history as it was right after the first `count` probes."""
        logs = bisect_right(self.logs, self.probes[count - 1]["step"], key=lambda entry: entry["step"])
        return replace(self, probes=self.probes[:count], logs=self.logs[:logs])

    def first(self, key: str) -> float:
        """A metric of the first probe; NaN if it has none."""
        return self.probes[0].get(key, math.nan)

    def last(self, key: str) -> float:
        """A metric of the last probe; NaN if it has none."""
        return self.probes[-1].get(key, math.nan)

    def change(self, key: str) -> float:
        return self.last(key) - self.first(key)

    def recent(self, key: str) -> float:
        """The mean over the last `RECENT` training logs that have `key`; NaN if none has."""
        values = list(islice((entry[key] for entry in reversed(self.logs) if key in entry), RECENT))
        return sum(values) / len(values) if values else math.nan

    def recent_steps(self) -> int:
        """How many training steps the last `RECENT` training logs cover."""
        before = self.logs[-RECENT - 1]["step"] if len(self.logs) > RECENT else 0
        return self.logs[-1]["step"] - before if self.logs else 0

    def has_enough(self, name: str) -> bool:
        """Whether a set has enough answers for a diagnosis."""
        return self.answers.get(name, 0) >= MIN_ANSWERS

    def negatives(self) -> list[str]:
        """The sets of negatives in the last probe, if they have enough answers."""
        return [name for name in sets_of(self.probes[-1]) if name != "chosen" and self.has_enough(name)]

    def dataset_negatives(self) -> list[str]:
        return [name for name in self.negatives() if name != "onpolicy"]

    def margin(self) -> float:
        """Held-out margin since the start, in nats per answer: the change of the chosen answers' log-prob minus the
        mean change of the dataset's negatives."""
        changes = [self.last(f"{name}_delta_logp") for name in self.dataset_negatives()]
        return self.last("chosen_delta_logp") - sum(changes) / len(changes) if changes else math.nan

    def has_cooling(self) -> bool:
        """Whether the loss of stage 2 has a cooling weight."""
        return self.settings.get("loss", CoolingWeighted.name) == CoolingWeighted.name

    def is_adaptive(self) -> bool:
        return self.has_cooling() and self.settings.get("cooling", "adaptive") == "adaptive"

    def cooling_weights(self) -> dict[str, float]:
        """Mean w_c by set of negatives. Empty if w_c is constant, which is the user's choice, or absent."""
        if not self.is_adaptive():
            return {}
        return {name: self.last(f"{name}_cooling") for name in self.negatives()}
