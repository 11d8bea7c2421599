"""The main metrics of a run, for the printed table and the model cards, and the environment they were measured in."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

import cwdpo_kernels
from cwdpo_trainer.evaluation.doctor import too_few
from cwdpo_trainer.evaluation.history import History, left_out_share, moved_share, sets_of
from cwdpo_trainer.run_folder import LABEL_OF_STAGE

TITLES = {"start": "start", "after_sft": "after SFT", "after_cwdpo": "after CW-DPO"}  # by label
NOTE = (
    "Δ log p, TV and JS compare a model with the one that its stage started from. On-policy answers are drawn anew in "
    "each stage, so each stage has its own lines on them: no line compares answers of one stage with those of another."
)
WORDINGS = 10  # references of a row, at most, whose shares are shown
PACKAGES = ("torch", "transformers", "accelerate")


class Line(NamedTuple):
    """A line of the table: title, metric, format of its values, what they are means over (n; "-": not
    recorded), and a value by model label (None: not measured)."""

    title: str
    key: str
    format: str
    n: str
    values: dict[str, float | None]

    def text(self, label: str) -> str:
        """The value of one model as text; "-" if it was not measured."""
        value = self.values[label]
        return "-" if value is None else format(value, self.format)


def labels_of(metrics: Mapping[str, Any]) -> list[str]:
    """The labels of the models in `metrics`, in the order of the run."""
    return [label for label in TITLES if label in metrics]


class _Row(NamedTuple):
    """A line before its values are known. `counted` names what its n counts; `labels` are the models it shows."""

    title: str
    key: str
    format: str
    counted: str
    labels: list[str]


def table(metrics: Mapping[str, Any]) -> list[Line]:
    """The lines of the table for `metrics` (layout of metrics.json). Lines without a value are omitted."""
    labels = labels_of(metrics)
    values = {label: {**metrics[label], **metrics[label]["probes"]} for label in labels}
    counts = {label: _counts(metrics[label]) for label in labels}
    sets = list(dict.fromkeys(name for label in reversed(labels) for name in sets_of(metrics[label]["probes"])))
    lines = []
    for row in _rows(labels, sets):
        of_row = {label: values[label].get(row.key) if label in row.labels else None for label in labels}
        measured = [label for label in labels if of_row[label] is not None]
        n = dict.fromkeys(counts[label][row.counted] for label in measured if row.counted in counts[label])
        if measured:
            lines.append(Line(row.title, row.key, row.format, " / ".join(n) or "-", of_row))
    return lines


def _rows(labels: list[str], sets: list[str]) -> list[_Row]:
    """The rows of the table. Each stage draws its own on-policy answers, so each has its own rows on them."""
    wordings = [(f"captions equal to reference {i + 1}", f"equal_to_reference_{i + 1}", ".3f") for i in range(WORDINGS)]
    captions = [("exact match of captions", "exact_match", ".3f"), ("CIDEr of captions (x 100)", "cider", ".1f")]
    groups = [(name, name, labels) for name in sets if name != "onpolicy"]
    if "onpolicy" in sets:
        groups += [(f"onpolicy of stage {i}", "onpolicy", shown) for i, shown in _labels_by_stage(labels).items()]
    rows = [_Row(*caption, "captions", labels) for caption in (*captions, *wordings)]
    rows += [_Row(f"log p, {title} (nats per answer)", f"{of}_logp", ".3f", of, shown) for title, of, shown in groups]
    rows += [
        _Row(f"Δ log p, {title} (nats per answer)", f"{of}_delta_logp", "+.3f", of, shown)
        for title, of, shown in groups
    ]
    distances = (("ECE, chosen", "ece"), ("TV, chosen", "tv"), ("JS, chosen (nats)", "js"))
    rows += [_Row(title, f"chosen_{key}", ".3f", "chosen", labels) for title, key in distances]
    rows.append(_Row("pairs left out of the loss", "pairs_left_out", ".1%", "steps", labels))
    rows.append(_Row("trained weights that moved", "weights_moved", ".1%", "weights", labels))
    return rows


def _labels_by_stage(labels: list[str]) -> dict[int, list[str]]:
    """The models that were measured on the on-policy answers of each stage, by its number. Its answers are drawn from
    the model it starts from, which is `start` for the first one."""
    stages = {number: [label] for number, label in enumerate(LABEL_OF_STAGE.values(), 1) if label in labels}
    if "start" in labels:
        next(iter(stages.values())).insert(0, "start")
    return stages


def _counts(entry: Mapping[str, Any]) -> dict[str, str]:
    """n with its unit, by what is counted, of a model's entry in metrics.json."""
    answers = {name: f"{count} answers" for name, count in entry.get("answers", {}).items()}
    others = {"captions": "captions", "steps": "pairs_left_out_steps", "weights": "trained_weights"}
    return answers | {unit: f"{entry[key]} {unit}" for unit, key in others.items() if key in entry}


def stage_metrics(history: History, probe: Mapping[str, Any], answers: Mapping[str, int]) -> dict[str, Any]:
    """The entry of metrics.json on the model after a stage: its last probe, the number of held-out answers by set, the
    share of pairs left out and that of weights that moved, each with its n."""
    entry: dict[str, Any] = {"probes": dict(probe), "answers": dict(answers)}
    for names, found in (
        (("pairs_left_out", "pairs_left_out_steps"), left_out_share(history)),
        (("weights_moved", "trained_weights"), moved_share(history)),
    ):
        if found is not None:
            entry |= dict(zip(names, found, strict=True))
    return entry


def too_few_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What the doctor says of stages with too few held-out answers, a line for each."""
    answers = {stage: metrics[label].get("answers", {}) for stage, label in LABEL_OF_STAGE.items() if label in metrics}
    lines = {stage: too_few(of_stage) for stage, of_stage in answers.items()}
    return [f"stage {stage}: {line}" for stage, line in lines.items() if line is not None]


def environment(device: str | torch.device) -> dict[str, str]:
    """Versions, device and backend, for metrics.json and the model card."""
    return {name: version(name) for name in PACKAGES} | {
        "cwdpo_kernels": cwdpo_kernels.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "backend": cwdpo_kernels.backend(torch.device(device)),
    }
