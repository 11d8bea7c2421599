"""The few figures of a run that its printed table and its model cards show, and where they were measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

import cwdpo_kernels
from cwdpo_trainer.evaluation.history import sets_of

TITLES = {"start": "start", "after_sft": "after SFT", "after_cwdpo": "after CW-DPO"}
REFERENCES = "reference: the initial model in stage 1, the model that stage 2 starts from in stage 2"
PACKAGES = ("torch", "transformers", "accelerate")


class Line(NamedTuple):
    """A line of the table: its title, the figure's name, how it is printed, its value by label (None: not measured)."""

    title: str
    key: str
    form: str
    values: dict[str, float | None]


def labels_of(metrics: Mapping[str, Any]) -> list[str]:
    """The models that `metrics` is about, in the order of the run."""
    return [label for label in TITLES if label in metrics]


def table(metrics: Mapping[str, Any]) -> list[Line]:
    """The lines of the table of `metrics`, laid out as metrics.json; what no model has is left out."""
    labels = labels_of(metrics)
    sets = sets_of(metrics[labels[-1]]["probes"])
    rows = [("exact match of captions", "exact_match", ".3f"), ("CIDEr (x 100)", "cider", ".1f")]
    rows += [(f"log p, {name} (nats)", f"{name}_logp", ".3f") for name in sets]
    rows += [(f"Δ log p against reference, {name}", f"{name}_delta_logp", ".3f") for name in sets]
    rows += [
        ("ECE, chosen", "chosen_ece", ".3f"),
        ("TV against reference, chosen", "chosen_tv", ".3f"),
        ("JS against reference, chosen (nats)", "chosen_js", ".3f"),
    ]
    figures = {label: {**metrics[label], **metrics[label]["probes"]} for label in labels}
    lines = [Line(*row, {label: figures[label].get(row[1]) for label in labels}) for row in rows]
    return [line for line in lines if any(value is not None for value in line.values.values())]


def printed(line: Line, label: str) -> str:
    """The value of one model, as text."""
    value = line.values[label]
    return "-" if value is None else format(value, line.form)


def environment(device: str | torch.device) -> dict[str, str]:
    """What the figures were made with."""
    return {name: version(name) for name in PACKAGES} | {
        "cwdpo_kernels": cwdpo_kernels.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "backend": cwdpo_kernels.backend(torch.device(device)),
    }
