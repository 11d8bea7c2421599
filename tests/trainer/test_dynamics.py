"""The plot of the learning dynamics: every measured value is visible, also the first and the last."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cwdpo_trainer.evaluation.plot import PANELS, draw_dynamics
from cwdpo_trainer.evaluation.probes import COOLING_BINS, METRICS


def probe(step: int, weight: float | None) -> dict[str, float]:
    """A probe in which all negatives have the cooling weight `weight`."""
    entry = {f"eval_{name}_{metric}": 0.1 * step for name in ("chosen", "near") for metric in METRICS}
    if weight is not None:
        shares = {index: float(index == int(weight * COOLING_BINS)) for index in range(COOLING_BINS)}
        entry |= {"eval_near_cooling": weight}
        entry |= {f"eval_near_cooling_bin{index}": share for index, share in shares.items()}
    return {"step": step, **entry}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that draws log histories and returns the axes of each panel by title."""
    canvases = []
    plain = FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda self: (canvases.append(self), plain(self)))

    def draw(histories):
        draw_dynamics(tmp_path / "dynamics.png", histories)
        fields = canvases[-1].figure.subfigs
        return {panel.title: field.axes for panel, field in zip(PANELS, fields, strict=True)}

    return draw


SHORT = {
    "sft": [probe(0, None), probe(9, None)],  # with `auto`, stage 1 has no cooling weights
    "dpo": [probe(0, 0.95), probe(2, 0.95), probe(9, 0.05)],
}


def numbers(ax) -> list[str]:
    return [tick.label1.get_text() for tick in ax.yaxis.get_major_ticks() if tick.label1.get_visible()]


def notes(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("title", ["Cooling weight of negatives", "Distribution of the cooling weight"])
def test_a_shared_axis_is_labeled_at_the_stage_with_data(drawn, title):
    empty, ax, *_ = drawn(SHORT)[title]
    assert notes(empty) == ["not in this stage"]
    assert numbers(empty) == []
    assert "1.0" in numbers(ax)


def test_a_stage_without_training_logs_says_nothing_logged(drawn):
    axes = drawn(SHORT)
    assert [notes(ax) for ax in axes["Training loss"]] == [["nothing logged"]] * 2
    logged = {**SHORT, "sft": [*SHORT["sft"], {"step": 9, "loss": 0.5}]}
    axes = drawn(logged)
    assert [notes(ax) for ax in axes["Training loss"]] == [[], ["nothing logged"]]
    assert [notes(ax) for ax in axes["Rewards of training pairs"]] == [["not in this stage"], ["nothing logged"]]


def test_a_single_point_is_visible(drawn):
    ax, _ = drawn({**SHORT, "sft": [*SHORT["sft"], {"step": 9, "loss": 0.5}]})["Training loss"]
    (line,) = ax.lines
    assert line.get_marker() == "o"


def test_the_last_histogram_is_within_the_axis(drawn):
    _, ax, *_ = drawn(SHORT)["Distribution of the cooling weight"]
    (mesh,) = ax.collections
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [0, 1, 5.5, 9]
    assert ax.get_xlim() == (0, 9)
    assert mesh.get_array().reshape(COOLING_BINS, 3)[:, 2].tolist() == [1.0] + [0.0] * (COOLING_BINS - 1)
