"""Negatives that the policy drew itself, mixed with those of the data set.

Which pair gets one is a pure function of (seed, optimizer step, row); what it gets depends on the weights, on
the step and on the pool, which is part of a checkpoint. So a resumed run continues exactly.
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
    """What the pool asks of the model in training, about rows by their id; at each step, of no row too."""

    def draw(self, rows: Sequence[int], seed: int) -> list[list[Tokens]]:
        """Wrong answers to each row, maybe none."""

    def mean_logp(self, rows: Sequence[int], answers: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """The log-prob of each of the answers to each row, in nats per token."""


class Drawn(NamedTuple):
    """A row's answers, the step that drew them, and their log-probs then (nats per token; none if not measured)."""

    step: int
    answers: list[Tokens]
    logp: list[float]


class Mixed(NamedTuple):
    """Negatives of P pairs, which of them are on-policy, and how stale the answers were that served before: by
    row, nats per token."""

    negatives: list[Tokens]
    is_onpolicy: list[bool]
    staleness: list[float]

    def figures(self) -> dict[str, float]:
        """The share of on-policy negatives, and the mean staleness: NaN where none was measured."""
        staleness = fmean(self.staleness) if self.staleness else math.nan
        return {"onpolicy": fmean(self.is_onpolicy), "onpolicy_staleness": staleness}


def unmixed(rejected: Sequence[Tokens]) -> Mixed:
    """The data set's negatives alone."""
    return Mixed(list(rejected), [False] * len(rejected), [])


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone: the same in every process and in every restart."""
    word = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") / 2**64


@dataclass
class OnPolicyPool:
    """Drawn answers by row, each row's used until they are stale, and then drawn anew.

    A row's answers are drawn when it first needs one, with all others of its batch that do: nothing is
    generated for rows that training never reaches. They are stale after `refresh_steps` optimizer steps, or when

        mean over the row's answers of  l(answer) when drawn - l(answer) now  >  max_staleness

    with l the policy's mean log-prob in nats per token. As the answers were drawn by the policy of then, this
    estimates KL(policy then || policy now) per token. `max_staleness` None measures nothing.
    """

    refresh_steps: int
    max_staleness: float | None
    seed: int
    drawn: dict[int, Drawn] = field(default_factory=dict)

    def mix(self, rows: Sequence[int], rejected: Sequence[Tokens], step: int, fraction: float, policy: Policy) -> Mixed:
        """The negatives for `rows` at `step`, a share `fraction` of them on-policy.

        A row none of whose samples was wrong keeps its negative of the data set.
        """
        if fraction == 0:
            return unmixed(rejected)
        wanted = [row for row in rows if uniform(self.seed, step, row) < fraction]
        young = [row for row in wanted if row in self.drawn and step - self.drawn[row].step < self.refresh_steps]
        staleness = self._staleness(young, step, policy)
        faded = [row for row, lost in staleness.items() if lost > self.max_staleness]
        stale = [row for row in wanted if row not in young or row in faded]
        self._draw(stale, step, policy)
        mixed = unmixed(rejected)._replace(staleness=list(staleness.values()))
        for place, row in enumerate(rows):
            candidates = self.drawn[row].answers if row in wanted else []
            if candidates:
                pick = int(uniform(self.seed, step, row, "pick") * len(candidates))
                mixed.negatives[place], mixed.is_onpolicy[place] = candidates[pick], True
        return mixed

    def _staleness(self, rows: Sequence[int], step: int, policy: Policy) -> dict[int, float]:
        """How much likelihood the answers of `rows` lost since they were drawn, where they may have lost any."""
        if self.max_staleness is None:
            return {}
        used = [row for row in rows if self.drawn[row].logp and self.drawn[row].step < step]
        now = policy.mean_logp(used, [self.drawn[row].answers for row in used])
        return {row: fmean(self.drawn[row].logp) - fmean(logp) for row, logp in zip(used, now, strict=True)}

    def _draw(self, rows: Sequence[int], step: int, policy: Policy) -> None:
        answers = policy.draw(rows, int(uniform(self.seed, step, "draw", *rows) * 2**31))
        logp = policy.mean_logp(rows, answers) if self.max_staleness is not None else [[] for _ in rows]
        self.drawn.update((row, Drawn(step, *entry)) for row, *entry in zip(rows, answers, logp, strict=True))

    def save(self, path: Path) -> None:
        """Write the pool as JSON, for a checkpoint."""
        path.write_text(json.dumps(self.drawn))

    def load(self, path: Path) -> None:
        """Take the pool that `save` wrote."""
        self.drawn = {int(row): Drawn(*entry) for row, entry in json.loads(path.read_text()).items()}
