"""The main metrics of a run, for the printed table and the model cards, and the environment they were measured in."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

import cwdpo_kernels
from cwdpo_trainer.evaluation.history import History, left_out_share, moved_share, sets_of

TITLES = {"start": "start", "after_sft": "after SFT", "after_cwdpo": "after CW-DPO"}  # by label
NOTE = "Δ log p, TV and JS compare a model with the one that its stage started from."
WORDINGS = 10  # references of a row, at most, whose shares are shown
PACKAGES = ("torch", "transformers", "accelerate")


class Line(NamedTuple):
    """A line of the table: title, metric, format of its values, and a value by model label (None: not measured)."""

    title: str
    key: str
    format: str
    values: dict[str, float | None]

    def text(self, label: str) -> str:
        """The value of one model as text; "-" if it was not measured."""
        value = self.values[label]
        return "-" if value is None else format(value, self.format)


def labels_of(metrics: Mapping[str, Any]) -> list[str]:
    """The labels of the models in `metrics`, in the order of the run."""
    return [label for label in TITLES if label in metrics]


def table(metrics: Mapping[str, Any]) -> list[Line]:
    """The lines of the table for `metrics` (layout of metrics.json). Lines without a value are omitted."""
    labels = labels_of(metrics)
    sets = sets_of(metrics[labels[-1]]["probes"])
    rows = [("exact match of captions", "exact_match", ".3f"), ("CIDEr of captions (x 100)", "cider", ".1f")]
    rows += [(f"captions equal to reference {i + 1}", f"equal_to_reference_{i + 1}", ".3f") for i in range(WORDINGS)]
    rows += [(f"log p, {name} (nats per answer)", f"{name}_logp", ".3f") for name in sets]
    rows += [(f"Δ log p, {name} (nats per answer)", f"{name}_delta_logp", "+.3f") for name in sets]
    rows += [
        ("ECE, chosen", "chosen_ece", ".3f"),
        ("TV, chosen", "chosen_tv", ".3f"),
        ("JS, chosen (nats)", "chosen_js", ".3f"),
        ("pairs left out of the loss", "pairs_left_out", ".1%"),
        ("trained weights that moved", "weights_moved", ".1%"),
    ]
    values = {label: {**metrics[label], **metrics[label]["probes"]} for label in labels}
    lines = [Line(*row, {label: values[label].get(row[1]) for label in labels}) for row in rows]
    return [line for line in lines if any(value is not None for value in line.values.values())]


def stage_metrics(history: History, probe: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of metrics.json on the model after a stage: its last probe, and the share of pairs left out."""
    shares = {"pairs_left_out": left_out_share(history), "weights_moved": moved_share(history)}
    return {"probes": dict(probe)} | {name: share for name, share in shares.items() if share is not None}


def environment(device: str | torch.device) -> dict[str, str]:
    """Versions, device and backend, for metrics.json and the model card."""
    return {name: version(name) for name in PACKAGES} | {
        "cwdpo_kernels": cwdpo_kernels.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "backend": cwdpo_kernels.backend(torch.device(device)),
    }
