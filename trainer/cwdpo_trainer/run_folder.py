"""The run folder: what is in it, who writes it, and what counts as done.

    run.json            run.py: the config without access tokens, and digests of the datasets, of their images and of
                        the model that the run starts from, before the first step. Once there is a checkpoint, the
                        folder continues this run only (`RunFolder.check`).
    run.lock            locked by the main process while it trains (`RunFolder.acquire`)
    checkpoints/STAGE/checkpoint-STEP/, until the stage is done, unless the config says checkpoints: keep
                        stages/base.py: a checkpoint of transformers.Trainer and the stage's own state. The file
                        COMPLETE, written last, lists the files and their checksums (manifest.py); a run resumes from
                        the newest checkpoint whose files are as they were written (stages/checkpoints.py).
    checkpoints/dpo/negatives_RANK.jsonl
                        negatives/log.py: the negative of each pair at each step
    reference_cache/    models/reference_cache.py: log-probs under the reference of stage 2, unless
                        dpo.reference_cache names another folder
    sft/, cwdpo/        run.py: the model after each stage, its processor, trainer_state.json, heldout_answers.json
                        and cooling.json;
                        evaluation/card.py: README.md. A folder gets its name once all files are in it, so a stage is
                        done if its folder exists (`RunFolder.is_done`). COMPLETE lists the files here too.
    probes.csv, predictions.jsonl, dynamics.png
                        evaluation/report.py: the report
    metrics.json        evaluation/report.py, written last: the stages in it are finished (`RunFolder.is_reported`)

STAGE is sft or dpo, RANK the index of the process in a distributed run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.config.sections import STAGES, without_secrets
from cwdpo_trainer.errors import InputError, require, shorten
from cwdpo_trainer.files import is_temporary, read_json_object, remove_temporary_files, write_json
from cwdpo_trainer.manifest import COMPLETE, verify

STATE_FILE = "trainer_state.json"  # in a checkpoint and in a stage's model folder
ANSWERS_FILE = "heldout_answers.json"  # in a stage's model folder: how many held-out answers of each set were probed
COOLING_FILE = "cooling.json"  # the `Cooling` of stage 2, in its checkpoints and in its model folder
MODEL_FOLDERS = {"sft": "sft", "dpo": "cwdpo"}  # by stage
LABEL_OF_STAGE = {"sft": "after_sft", "dpo": "after_cwdpo"}  # the model after a stage, in metrics.json
FINDING_FIELDS = {"name", "stage", "step", "evidence", "advice"}  # of evaluation/doctor.py, in metrics.json
METRIC_LABELS = {"start", *LABEL_OF_STAGE.values()}
# Seconds. Data-loading workers of a killed process may hold its lock until they notice, which takes them 5.
LOCK_TIMEOUT = 10.0


class RunFolder:
    """The folder of one run at `path`, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record_file = path / "run.json"
        self.metrics_file = path / "metrics.json"
        self.probes_file = path / "probes.csv"
        self.predictions_file = path / "predictions.jsonl"
        self.plot_file = path / "dynamics.png"
        self._lock = FileLock(path / "run.lock")

    def __str__(self) -> str:
        return str(self.path)

    def is_run(self) -> bool:
        """Whether a run was started in this folder."""
        return self.record_file.is_file()

    def recorded_config(self) -> dict[str, Any]:
        """The config that the run was started with."""
        return self._recorded()["config"]

    def write_record(self, config: RunConfig, inputs: Mapping[str, Any]) -> None:
        """Write run.json, which ties the folder to this config and these `inputs` (digests by name, nested)."""
        write_json(self.record_file, _record(config, inputs))

    def check(self, config: RunConfig, inputs: Mapping[str, Any]) -> None:
        """Raise `InputError` unless the folder is missing, empty, of a run with this config and these inputs, or of any
        run without a checkpoint."""
        if not self.path.exists():
            return
        require(self.path.is_dir(), str(self), "output_dir", "a folder", "a file")
        if not self.is_run():
            others = (path for path in self.path.iterdir() if not self._is_before_record(path))
            found = sorted(path.name for path in others)
            require(not found, str(self), "output_dir", "an empty folder or that of a run",
                    f"one with {', '.join(found[:5])}")  # fmt: skip
            return
        if not self.has_progress():
            return
        before, now = _flatten(self._recorded()), _flatten(_record(config, inputs))
        for key in sorted(before.keys() | now.keys()):
            expected = f"{before.get(key)!r}, as this run was started with (or use another output_dir)"
            what = key.removeprefix("config.")
            require(before.get(key) == now.get(key), str(self), what, expected, repr(now.get(key)))

    def _is_before_record(self, path: Path) -> bool:
        """Whether a run that was killed before it wrote run.json may have left `path`."""
        own = path.name in ("run.lock", "reference_cache") or (path.name == "checkpoints" and not self.has_progress())
        return own or is_temporary(path)

    def _recorded(self) -> dict[str, Any]:
        record = read_json_object(self.record_file)
        for section in ("config", "inputs"):
            found = record.get(section)
            require(isinstance(found, dict), str(self.record_file), section, "a JSON object", type(found).__name__)
        return record

    def acquire(self) -> None:
        """Lock the folder for this process, creating it if necessary. Raises `InputError` if another process holds it.

        The operating system releases the lock when the process ends, however it ends.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout:
            expected = "a folder that no other process trains in (wait for it, or use another output_dir)"
            raise InputError(str(self), "output_dir", expected, "one that is in use") from None
        remove_temporary_files(self.path)

    def release(self) -> None:
        self._lock.release()

    def model(self, stage: str) -> Path:
        """The folder of the model after `stage`."""
        return self.path / MODEL_FOLDERS[stage]

    def has_progress(self) -> bool:
        """Whether there is something to continue: a checkpoint or a finished stage."""
        return any(self.is_done(stage) or any(self.checkpoints(stage).glob("checkpoint-*")) for stage in STAGES)

    def checkpoints(self, stage: str) -> Path:
        """The folder of the checkpoints of `stage`."""
        return self.path / "checkpoints" / stage

    def is_done(self, stage: str) -> bool:
        return self.model(stage).is_dir()

    def verify_model(self, stage: str) -> None:
        """Raise `InputError` about a file of the model after `stage` that is not as it was saved."""
        try:
            verify(self.model(stage))
        except InputError as error:
            has_checkpoint = any(self.checkpoints(stage).glob(f"checkpoint-*/{COMPLETE}"))
            again = "write it again from the stage's last checkpoint" if has_checkpoint else "train the stage again"
            advice = f"{error.expected}; delete {self.model(stage)} to {again}"
            raise InputError(error.where, error.what, advice, error.got) from error

    def done_stages(self) -> list[str]:
        return [stage for stage in STAGES if self.is_done(stage)]

    def is_reported(self, stages: Sequence[str]) -> bool:
        """Whether metrics.json has the results of `stages`."""
        labels = {LABEL_OF_STAGE[stage] for stage in stages}
        return self.metrics_file.exists() and labels <= self.metrics().keys()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json. Raises `InputError` unless it has the layout that the report writes."""
        metrics, where = read_json_object(self.metrics_file), str(self.metrics_file)
        advice = "(delete the file, and `cwdpo run` writes it again)"
        for label in METRIC_LABELS & metrics.keys():
            found = metrics[label]
            ok = isinstance(found, dict) and isinstance(found.get("probes"), dict) and all(
                isinstance(value, int | float) for value in _numbers_of(found)
            )  # fmt: skip
            expected = f"numbers, and numbers under probes and answers {advice}"
            require(ok, where, label, expected, shorten(json.dumps(found), 100))
        findings = metrics.get("findings")
        ok = isinstance(findings, list) and all(
            isinstance(finding, dict) and finding.keys() == FINDING_FIELDS for finding in findings
        )
        require(ok, where, "findings", f"a list of findings {advice}", shorten(json.dumps(findings), 100))
        base_model = metrics.get("base_model")
        require(isinstance(base_model, str), where, "base_model", f"a name or a path {advice}", repr(base_model))
        return metrics


def _numbers_of(entry: dict[str, Any]) -> list[Any]:
    """What should be numbers in the entry of a model in metrics.json. Those of an earlier version have no answers."""
    answers = entry.get("answers", {})
    inner = [*entry["probes"].values(), *(answers.values() if isinstance(answers, dict) else [answers, None])]
    return inner + [value for key, value in entry.items() if key not in ("probes", "answers")]


def _record(config: RunConfig, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a run. Where its folder is does not matter, nor do access tokens and what is kept."""
    kept = {key: value for key, value in config.raw.items() if key not in ("output_dir", "checkpoints")}
    settings = without_secrets(kept)
    return json.loads(json.dumps({"config": settings, "inputs": inputs}, default=str))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
