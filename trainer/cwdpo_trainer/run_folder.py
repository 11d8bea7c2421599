"""The folder of a run: the names in it, the record that ties it to one run, and which stages are done.

It holds

    run.json            the configuration and digests of the data: a folder continues one run only
    checkpoints/STAGE/  the library's checkpoints; one with a file COMPLETE was written to its end; in dpo/ also
                        negatives_PROCESS.jsonl: where each pair's negative came from, step by step
    reference_cache/    log-probs under stage 2's reference, unless dpo.reference_cache names another place
    sft/, cwdpo/        the model after each stage, with processor, trainer state and card: there when it is done
    metrics.json, probes.csv, predictions.jsonl, dynamics.png   see report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.errors import require
from cwdpo_trainer.files import read_json

RECORD_FILE = "run.json"
STATE_FILE = "trainer_state.json"
COOLING_FILE = "cooling.json"  # the `Cooling` of stage 2: in its checkpoints and beside its model
MODEL_FOLDERS = {"sft": "sft", "dpo": "cwdpo"}  # of the model after each stage


def record(config: RunConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What makes a run this run; where its folder lies does not matter."""
    settings = {key: value for key, value in config.raw.items() if key != "output_dir"}
    return json.loads(json.dumps({"config": settings, "data": digests}, default=str))


def check_folder(config: RunConfig, digests: dict[str, str]) -> None:
    """The run folder is new, or that of this run. Raises `InputError` if not."""
    folder = config.output_dir
    if not folder.exists():
        return
    require(folder.is_dir(), str(folder), "output_dir", "a folder", "a file")
    stored = folder / RECORD_FILE
    if not stored.exists():
        found = sorted(path.name for path in folder.iterdir())
        require(
            not found, str(folder), "output_dir", "an empty folder or that of a run", f"one with {', '.join(found[:5])}"
        )
        return
    before, now = _flatten(read_json(stored)), _flatten(record(config, digests))
    for key in sorted(before.keys() | now.keys()):
        same = before.get(key) == now.get(key)
        expected = f"{before.get(key)!r}, as when this run was started (or use another output_dir)"
        require(same, str(folder), key, expected, repr(now.get(key)))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def is_done(folder: Path, stage: str) -> bool:
    return (folder / MODEL_FOLDERS[stage]).is_dir()
