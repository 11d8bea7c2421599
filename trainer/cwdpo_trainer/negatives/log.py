"""A log of where each pair's negative came from, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cwdpo_trainer.errors import InputError, shorten
from cwdpo_trainer.files import flush, read_text, write_text


class NegativesLog:
    """A JSONL file with one line per pair and step: {"step", "row": "file:line", "origin", "answer"}.

    "step" is the number of optimizer steps taken before. "origin" is "dataset" or "onpolicy". "answer" is the text of
    an on-policy negative; dataset negatives have none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int) -> None:
        """Start the log at `step`. Lines of a killed run from that step on are deleted, because it runs them again.

        Raises `InputError` about a line that this class did not write."""
        lines = read_text(self.path).split("\n") if step and self.path.exists() else [""]
        # A kill can cut only the last line, and its step is later than any checkpoint.
        kept = [line + "\n" for index, line in enumerate(lines[:-1], start=1) if self._step(index, line) < step]
        write_text(self.path, "".join(kept))

    def _step(self, number: int, line: str) -> int:
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            step = None
        if not isinstance(step, int):
            expected = "a JSON object with a step (delete the line, or the file, to go on without it)"
            raise InputError(f"{self.path}:{number}", "", expected, shorten(repr(line), 80))
        return step

    def flush(self) -> None:
        """Return once all lines are on the disk. A checkpoint counts on those of the steps before it."""
        if self.path.exists():
            flush(self.path)

    def write(self, step: int, rows: Sequence[str], is_onpolicy: Sequence[bool], texts: Sequence[str]) -> None:
        """Append a step's pairs: their rows as "file:line", and the origin and text of each negative."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row, drawn, text in zip(rows, is_onpolicy, texts, strict=True):
                entry = {"step": step, "row": row, "origin": "onpolicy" if drawn else "dataset"}
                file.write(json.dumps({**entry, "answer": text} if drawn else entry) + "\n")
