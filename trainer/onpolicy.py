"""Negatives that the policy drew itself, mixed with those of the data set.

Which pair gets one is a pure function of (seed, optimizer step, row); what it gets depends on the weights, on
the step and on the pool, which is part of a checkpoint. So a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cwdpo_trainer.collator import Tokens

Draw = Callable[[Sequence[int], int], list[list[Tokens]]]


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone: the same in every process and in every restart."""
    word = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") / 2**64


@dataclass
class OnPolicyPool:
    """Drawn answers by row, each used for `refresh_steps` optimizer steps and then drawn anew.

    A row's answers are drawn when it first needs one, with all others of its batch that do: nothing is
    generated for rows that training never reaches.
    """

    fraction: float
    refresh_steps: int
    seed: int
    answers: dict[int, tuple[int, list[Tokens]]] = field(default_factory=dict)

    def mix(self, rows: Sequence[int], rejected: Sequence[Tokens], step: int, draw: Draw) -> tuple[list[Tokens], int]:
        """The negatives for `rows` at `step`, and how many of them are on-policy.

        `draw(rows, seed)` samples answers for rows. A row none of whose samples was wrong keeps its negative.
        """
        wanted = [row for row in rows if uniform(self.seed, step, row) < self.fraction]
        stale = [row for row in wanted if row not in self.answers or self._age(row, step) >= self.refresh_steps]
        if stale:
            drawn = draw(stale, int(uniform(self.seed, step, "draw", *stale) * 2**31))
            self.answers.update((row, (step, answers)) for row, answers in zip(stale, drawn, strict=True))
        mixed, used = list(rejected), 0
        for place, row in enumerate(rows):
            candidates = self.answers[row][1] if row in wanted else []
            if candidates:
                mixed[place] = candidates[int(uniform(self.seed, step, row, "pick") * len(candidates))]
                used += 1
        return mixed, used

    def _age(self, row: int, step: int) -> int:
        return step - self.answers[row][0]

    def save(self, path: Path) -> None:
        """Write the pool as JSON, for a checkpoint."""
        path.write_text(json.dumps({str(row): entry for row, entry in self.answers.items()}))

    def load(self, path: Path) -> None:
        """Take the pool that `save` wrote."""
        stored: dict[str, Any] = json.loads(path.read_text())
        self.answers = {int(row): (step, answers) for row, (step, answers) in stored.items()}
