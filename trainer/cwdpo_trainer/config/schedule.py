"""A number that may change over a stage."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Points (place, value), linear in between, constant before the first and after the last of them.

    Places are shares of the stage if none is above 1, else optimizer steps.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """From a number, or a list of [place, value] whose places rise. Raises `ValueError`, without a name."""
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return cls(((0.0, float(value)),))
        try:
            points = tuple((float(place), float(number)) for place, number in value)
        except TypeError as error:
            raise ValueError("neither a number nor a list of [place, value]") from error
        places = [place for place, _ in points]
        if not points or places[0] < 0 or any(not before < after for before, after in pairwise(places)):
            raise ValueError("no list of [place, value] whose places are >= 0 and rise")
        return cls(points)

    def at(self, step: int, steps: int) -> float:
        """The value at optimizer step `step` of `steps`."""
        place = step / max(steps, 1) if self.points[-1][0] <= 1 else float(step)
        for (left, before), (right, after) in pairwise(self.points):
            if left <= place < right:
                return before + (after - before) * (place - left) / (right - left)
        return self.points[0][1] if place < self.points[0][0] else self.points[-1][1]
