"""Where each pair's negative came from, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cwdpo_trainer.files import write_text


class NegativesLog:
    """A JSONL file, one line for each pair of a step: {"step", "row": "file:line", "origin", "answer"}.

    "step" counts the optimizer steps before; "origin" is dataset or onpolicy; "answer", the text, is there for
    onpolicy only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int) -> None:
        """Begin, or go on at `step`: the lines from it on are of a run that was cut off, and are dropped."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if step and self.path.exists() else []
        # Only a last line may be incomplete, and it is of a step that no checkpoint covers.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        write_text(self.path, "".join(kept))

    def write(self, step: int, rows: Sequence[str], is_onpolicy: Sequence[bool], texts: Sequence[str]) -> None:
        """Add the pairs of a step: the places of their rows, and of each negative the origin and the text."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row, drawn, text in zip(rows, is_onpolicy, texts, strict=True):
                entry = {"step": step, "row": row, "origin": "onpolicy" if drawn else "dataset"}
                file.write(json.dumps({**entry, "answer": text} if drawn else entry) + "\n")
