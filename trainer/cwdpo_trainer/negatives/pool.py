"""A pool of answers that the policy drew, which replace a share of the dataset's negatives.

Which pairs get an on-policy negative depends only on seed, optimizer step and row. Which answer they get depends also
on the weights and on the pool. Both are saved in checkpoints, so a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, Protocol

from cwdpo_trainer.data.collator import Tokens


class Policy(Protocol):
    """What the pool needs of the model in training. Rows are given by id.

    The pool makes the same calls in every process at each step, possibly with no rows.
    """

    def draw(self, rows: Sequence[int], seed: int) -> list[list[Tokens]]:
        """Sampled wrong answers to each row; the list of a row may be empty."""

    def mean_logp(self, rows: Sequence[int], answers: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """The mean log-prob of each answer to each row, in nats per token."""


class Drawn(NamedTuple):
    """The answers drawn for a row, the step of the draw, and their mean log-probs then (nats per token; empty if not
    measured)."""

    step: int
    answers: list[Tokens]
    logp: list[float]


class BatchNegatives(NamedTuple):
    """The negatives of a batch of P pairs.

    `answers` [P] as tokens; `is_onpolicy` [P]; `staleness`: for each row whose pooled answers were measured at this
    step, the mean log-prob that they lost since they were drawn, in nats per token.
    """

    answers: list[Tokens]
    is_onpolicy: list[bool]
    staleness: list[float]

    @classmethod
    def of_dataset(cls, rejected: Sequence[Tokens]) -> BatchNegatives:
        """The dataset's negatives only."""
        return cls(list(rejected), [False] * len(rejected), [])

    def metrics(self) -> dict[str, float]:
        """The share of on-policy negatives, and the mean staleness (NaN if none was measured)."""
        staleness = fmean(self.staleness) if self.staleness else math.nan
        return {"onpolicy": fmean(self.is_onpolicy), "onpolicy_staleness": staleness}


def uniform(*key: object) -> float:
    """A pseudo-random number in [0, 1), the same for the same `key` in every process and every restart."""
    word = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") / 2**64


@dataclass
class OnPolicyPool:
    """Drawn answers by row. A row's answers are used until they are stale, then drawn again.

    A row's answers are drawn when it first needs one, together with those of the other rows in its batch. Rows that
    training never reaches cost nothing. Answers are stale after `refresh_steps` optimizer steps, or when

        mean over the row's answers of  l(answer) when drawn - l(answer) now  >  max_staleness

    with l the policy's mean log-prob in nats per token. The answers are samples of the policy at the time of the draw,
    so this estimates KL(policy then || policy now) per token. With `max_staleness` None it is not measured.
    """

    refresh_steps: int
    max_staleness: float | None
    seed: int
    drawn: dict[int, Drawn] = field(default_factory=dict)

    def mix(
        self, rows: Sequence[int], rejected: Sequence[Tokens], step: int, fraction: float, policy: Policy
    ) -> BatchNegatives:
        """The negatives for `rows` at `step`: `rejected`, a share `fraction` of them replaced by on-policy ones.

        A row keeps its dataset negative if none of its samples was wrong.
        """
        negatives = BatchNegatives.of_dataset(rejected)
        if fraction == 0:
            return negatives
        wanted = [row for row in rows if uniform(self.seed, step, row) < fraction]
        recent = [row for row in wanted if row in self.drawn and step - self.drawn[row].step < self.refresh_steps]
        staleness = self._staleness(recent, step, policy)
        limit = math.inf if self.max_staleness is None else self.max_staleness
        fresh = [row for row in recent if not staleness.get(row, 0.0) > limit]
        self._draw([row for row in wanted if row not in fresh], step, policy)
        for index, row in enumerate(rows):
            candidates = self.drawn[row].answers if row in wanted else []
            if candidates:
                pick = int(uniform(self.seed, step, row, "pick") * len(candidates))
                negatives.answers[index], negatives.is_onpolicy[index] = candidates[pick], True
        return negatives._replace(staleness=list(staleness.values()))

    def _staleness(self, rows: Sequence[int], step: int, policy: Policy) -> dict[int, float]:
        """By row, the mean log-prob that its answers lost since they were drawn. Answers drawn at `step` lost none."""
        if self.max_staleness is None:
            return {}
        measured = [row for row in rows if self.drawn[row].logp and self.drawn[row].step < step]
        now = policy.mean_logp(measured, [self.drawn[row].answers for row in measured])
        return {row: fmean(self.drawn[row].logp) - fmean(logp) for row, logp in zip(measured, now, strict=True)}

    def _draw(self, rows: Sequence[int], step: int, policy: Policy) -> None:
        answers = policy.draw(rows, int(uniform(self.seed, step, "draw", *rows) * 2**31))
        logp: list[list[float]] = [[] for _ in rows]
        if self.max_staleness is not None:
            logp = policy.mean_logp(rows, answers)
        for row, of_row, logp_of_row in zip(rows, answers, logp, strict=True):
            self.drawn[row] = Drawn(step, of_row, logp_of_row)

    def save(self, path: Path) -> None:
        """Write the pool as JSON, for a checkpoint."""
        path.write_text(json.dumps(self.drawn))

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        self.drawn = {int(row): Drawn(*entry) for row, entry in json.loads(path.read_text()).items()}
