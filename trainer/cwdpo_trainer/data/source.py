"""What every kind of data set gives: rows with their places, and a digest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUB = "hub:"
DEFAULT_SPLIT = "train"


class Source(ABC):
    """`name` is how messages call it; relative paths of images start at `folder`."""

    name: str
    folder: Path

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, Any]]:
        """(place, what stands there) of each row; an `InputError` in place of a row that cannot be parsed."""

    @abstractmethod
    def digest(self) -> str:
        """So that a run can tell whether it goes on with the data that it started with."""

    def unused_columns(self) -> list[str]:
        """Columns that are there and not read. Files have none: there an unknown name is a mistake."""
        return []
