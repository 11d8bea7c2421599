"""A valid run that tests of `cwdpo check` break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import LlavaProcessor

from cwdpo_trainer.preflight.dry_run import dry_run
from cwdpo_trainer.preflight.run_rules import Problem


class Case:
    """A valid run in a folder of its own. Tests may change its parts."""

    def __init__(self, folder: Path, task: Path, settings: dict, write_config: Callable[[dict], Path]) -> None:
        self.folder, self.settings, self.write_config = folder, settings, write_config
        for name in ("images", "model"):
            shutil.copytree(task / name, folder / name)
        self.train = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
        heldout = [json.loads(line) for line in (task / "heldout.jsonl").read_text().splitlines()]
        self.heldout = [{**row, "prompt": row["prompt"] + " the square"} for row in heldout]  # not in train
        settings["model"] = {"path": "model"}
        settings["data"] = {"train": "train.jsonl", "heldout": "heldout.jsonl"}

    def save(self) -> Path:
        for name in ("train", "heldout"):
            lines = (row if isinstance(row, str) else json.dumps(row) for row in getattr(self, name))
            (self.folder / f"{name}.jsonl").write_text("\n".join(lines))
        return self.write_config(self.settings)

    def problems(self, *overrides: str) -> list[Problem]:
        _, problems = dry_run(self.save(), overrides, rows=100)
        return problems

    def change(self, index: int, **columns: object) -> None:
        self.train[index] = self.train[index] | columns

    def processor(self, **changes: object) -> LlavaProcessor:
        return LlavaProcessor.from_pretrained(self.folder / "model", **changes)
