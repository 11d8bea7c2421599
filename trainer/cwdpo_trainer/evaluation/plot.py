"""The plot of the learning dynamics: how both stages change the model's probabilities, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cwdpo_trainer.evaluation.history import History, probe_entries, sets_of, training_entries
from cwdpo_trainer.evaluation.probes import COOLING_BINS

Draw = Callable[[Axes, History, list[str]], None]

# Okabe and Ito's palette for color-blind readers. Markers and dashes also differ, for grayscale prints.
STYLES: dict[str, dict[str, Any]] = {
    "chosen": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "near": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "easy": {"color": "#E69F00", "marker": "^", "linestyle": "-."},
    "onpolicy": {"color": "#009E73", "marker": "D", "linestyle": ":"},
}
OTHER_COLORS = ("#CC79A7", "#56B4E9", "#000000")
CROWDED = 40  # points; with more, markers would hide the line
STAGE_TITLES = {"sft": "1: SFT", "dpo": "2: CW-DPO"}


@dataclass(frozen=True)
class Panel:
    """A panel: its title, the label of its y axis with the unit, and a function that draws one stage.

    `same_scale`, or `limits` of the y axis: both stages share the axis. Otherwise each has its own, because their
    references differ, or because one stage's range is much larger.
    `of_training`: drawn from training logs. A stage of fewer steps than `logging_steps` has none.
    """

    title: str
    label: str
    draw: Draw
    same_scale: bool = False
    of_training: bool = False
    limits: tuple[float, float] | None = None


def draw_dynamics(path: Path, histories: dict[str, History]) -> None:
    """Draw all panels as a PNG file at `path`, from the log histories by stage, in the order of the run.

    A panel has one axis per stage. All axes have the same width, however many steps a stage took.
    """
    probes = [probe for history in histories.values() for probe in probe_entries(history)]
    sets = list(dict.fromkeys(name for probe in probes for name in sets_of(probe)))
    figure = Figure(figsize=(12 + 6 * len(histories), 9), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    fields = np.array(figure.subfigures(2, 5)).flat
    for index, (field, panel) in enumerate(zip(fields, PANELS, strict=True)):
        _draw_panel(field, panel, histories, sets, last_row=index >= 5)
    canvas.draw()
    # savefig would draw everything twice, the first time only to place the axes.
    Image.fromarray(np.asarray(canvas.buffer_rgba())).save(path, format="png")


def _draw_panel(field: SubFigure, panel: Panel, histories: dict[str, History], sets: list[str], last_row: bool) -> None:
    shared = panel.same_scale or panel.limits is not None
    axes = field.subplots(1, len(histories), sharey=shared, squeeze=False)[0]
    field.suptitle(panel.title, fontsize=12)
    axes[0].set_ylabel(panel.label)
    entries: dict[str, Any] = {}
    for ax, (stage, history) in zip(axes, histories.items(), strict=True):
        panel.draw(ax, history, sets)
        ax.set_title(f"stage {STAGE_TITLES[stage]}", fontsize=9, color="0.35")
        ax.set_xlim(0, max(entry["step"] for entry in history))
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        if panel.limits is not None:
            ax.set_ylim(*panel.limits)
        if last_row:
            ax.set_xlabel("optimizer step")
        if not ax.has_data():
            missing = "nothing logged" if panel.of_training and not training_entries(history) else "not in this stage"
            ax.text(0.5, 0.5, missing, transform=ax.transAxes, ha="center", color="0.5")
            ax.tick_params(axis="y", left=False, labelleft=False)  # the shared ticks of the other stage
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    for ax in [ax for ax in axes if ax.has_data()][:1]:  # a shared axis has its numbers at the first stage with data
        ax.tick_params(axis="y", labelleft=True)
    if len(entries) > 1:
        field.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _series(history: History, key: str) -> tuple[list[int], list[float]]:
    found = {entry["step"]: entry[key] for entry in history if key in entry}
    return sorted(found), [found[step] for step in sorted(found)]


def _style(name: str, sets: list[str]) -> dict[str, Any]:
    others = [other for other in sets if other not in STYLES]
    return STYLES.get(name) or {"color": OTHER_COLORS[others.index(name) % len(OTHER_COLORS)], "marker": "v"}


def _line(ax: Axes, history: History, key: str, label: str, style: dict[str, Any]) -> None:
    steps, values = _series(history, key)
    if len(steps) > CROWDED:
        style = {**style, "marker": ""}
    if steps:
        ax.plot(steps, values, label=label, linewidth=1.5, markersize=4, clip_on=False, **style)


def _by_set(key: str, only: str | None = None, without: str | None = None, zero: bool = False) -> Draw:
    """Draw a line per set of held-out answers. `zero` marks the level of no change."""

    def draw(ax: Axes, history: History, sets: list[str]) -> None:
        for name in sets:
            if only in (None, name) and name != without:
                _line(ax, history, f"eval_{name}_{key}", name, _style(name, sets))
        if zero:
            ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)

    return draw


def _lines(keys: dict[str, str]) -> Draw:
    """Draw a line per log key. `keys` maps it to its label."""

    def draw(ax: Axes, history: History, sets: list[str]) -> None:
        for (key, label), style in zip(keys.items(), STYLES.values(), strict=False):
            _line(ax, history, key, label, style)

    return draw


def _cooling_histogram(ax: Axes, history: History, sets: list[str]) -> None:
    """Draw the histogram of w_c at each probe, averaged over the dataset's sets of negatives."""
    names = [name for name in sets if name not in ("chosen", "onpolicy")]
    steps, _ = _series(history, f"eval_{names[0]}_cooling_bin0")
    if not steps:  # no weights in stage 1 if stage 2 is to measure logp_floor or tau
        return
    shares = [
        np.mean([_series(history, f"eval_{name}_cooling_bin{index}")[1] for name in names], axis=0)
        for index in range(COOLING_BINS)
    ]
    # Each probe's column reaches half-way to the next probe.
    edges = [0, *((one + other) / 2 for one, other in pairwise(steps)), steps[-1]]
    mesh = ax.pcolormesh(edges, np.linspace(0, 1, COOLING_BINS + 1), shares, cmap="cividis", norm=PowerNorm(0.5, 0, 1))
    spec = ax.get_subplotspec()
    if spec is not None and spec.is_last_col():
        ax.figure.colorbar(mesh, ax=ax, label="share of answers")


PANELS = (
    Panel("Log-probability of answers", "mean log p (nats per token)", _by_set("mean_logp")),
    Panel("Change of log p since the stage began", "Δ log p (nats per answer)", _by_set("delta_logp", zero=True)),
    Panel(
        "Distance from the stage's start,\nchosen answers",
        "TV, JS (nats)",
        _lines({"eval_chosen_tv": "TV", "eval_chosen_js": "JS"}),
    ),
    Panel("Training loss", "loss (nats)", _lines({"loss": "loss"}), of_training=True),
    Panel(
        "Rewards of training pairs",
        "β · log-ratio (nats)",
        _lines({"chosen_reward": "chosen", "rejected_reward": "rejected", "margin": "margin"}),
        of_training=True,
    ),
    Panel("Entropy of the next token", "entropy (nats per token)", _by_set("entropy")),
    Panel(
        "Confidence on chosen answers",
        "probability, share of tokens",
        _lines({"eval_chosen_top1_prob": "top-1 probability", "eval_chosen_accuracy": "top-1 accuracy"}),
    ),
    Panel("Calibration error on chosen answers", "ECE", _by_set("ece", only="chosen"), same_scale=True),
    Panel("Cooling weight of negatives", "mean w_c", _by_set("cooling", without="chosen"), limits=(0, 1)),
    Panel("Distribution of the cooling weight", "w_c of dataset negatives", _cooling_histogram, limits=(0, 1)),
)
