"""The interface of a source of rows: a file or a dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HUB = "hub:"
DEFAULT_SPLIT = "train"


class Source(ABC):
    """Messages call the source `name`. Relative image paths start at `folder`."""

    name: str
    folder: Path

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, Any]]:
        """(where, values) of each row. The values of a row that cannot be parsed are an `InputError`."""

    @abstractmethod
    def digest(self) -> str:
        """Identifies the content, so that a run can refuse to resume with other data."""

    def unused_columns(self) -> list[str]:
        """Columns that are not read. A file has none: there, an unknown column is an error."""
        return []
