"""A number that changes over a stage."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """(position, value) points, interpolated linearly; constant before the first and after the last point.

    Positions are fractions of the stage if none is above 1, else optimizer steps.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """From a number, or a list of [position, value] with increasing positions. Raises `ValueError` otherwise."""
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            value = [(0.0, value)]
        try:
            points = tuple((float(position), float(number)) for position, number in value)
        except (TypeError, OverflowError) as error:
            raise ValueError("neither a number nor a list of [position, value]") from error
        positions = [position for position, _ in points]
        increasing = all(before < after for before, after in pairwise(positions))
        if not points or not positions[0] >= 0 or not increasing:
            raise ValueError("positions must be >= 0 and increasing")
        return cls(points)

    def at(self, step: int, steps: int) -> float:
        """The value at optimizer step `step` of `steps`."""
        position = step / max(steps, 1) if self.points[-1][0] <= 1 else float(step)
        for (left, before), (right, after) in pairwise(self.points):
            if left <= position < right:
                return before + (after - before) * (position - left) / (right - left)
        return self.points[0][1] if position < self.points[0][0] else self.points[-1][1]
