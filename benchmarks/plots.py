"""The plots of docs/benchmarks.md: time and memory against one size, and errors against the label's probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# The color-blind-safe palette of Okabe and Ito. Markers and their sizes differ too, so that lines on top of each other
# stay visible.
STYLES = {
    "cwdpo_kernels": ("#000000", "o", 6),
    "eager, full logits": ("#E69F00", "D", 10),
    "torch.compile, full logits": ("#56B4E9", "X", 8.5),
    "cut-cross-entropy": ("#0072B2", "s", 5),
    "torch linear_cross_entropy": ("#009E73", "^", 6),
    "torch linear_cross_entropy, chunked": ("#009E73", "v", 6),
    "Liger fused linear DPO": ("#D55E00", "P", 6),
    "TRL chunked log-prob": ("#CC79A7", "*", 7),
    "TRL fused head": ("#CC79A7", "*", 7),
}
SWEEPS = {
    "response": "tokens per answer",
    "vocab": "vocabulary size",
    "share": "share of answer tokens in the sequence",
}
QUANTITIES = {"logp": "log-probs", "grad_hidden": "the gradient of hidden states"}
MIN_MIB = 0.1  # values below are drawn here: a logarithmic axis has no zero


def draw(reports: dict[str, dict], folder: Path) -> None:
    """Write one SVG per plot. Equal results give equal bytes with the same matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(
        {
            "svg.hashsalt": "cwdpo",
            "svg.fonttype": "none",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        for sweep in SWEEPS:
            _save(_sweep(reports["sweeps"]["measurements"], sweep), folder / f"{sweep}.svg")
        _save(_accuracy(reports["accuracy"]["measurements"]), folder / "accuracy.svg")
        _save(_sharing(reports["sharing"]["measurements"]), folder / "sharing.svg")
        _save(_real_model(reports["real_model"]["measurements"][0]["groups"]), folder / "real_model.svg")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def _sweep(measurements: list[dict], sweep: str) -> Figure:
    entries = [entry for entry in measurements if entry["sweep"] == sweep]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, key, title, least in (
        (axes[0], "median_seconds", "time per step (s)", 0.0),
        (axes[1], "extra_mib", "peak memory above inputs and gradients (MiB)", MIN_MIB),
    ):
        for name in STYLES:
            points = [(e["value"], max(e["results"][name][key], least)) for e in entries if name in e["results"]]
            _line(axis, name, points)
        if key == "median_seconds":
            limit = [(entry["value"], entry["limit_seconds"]) for entry in entries]
            axis.plot(*zip(*limit, strict=True), color="#999999", linestyle=":", label="matrix products only")
        axis.set(xscale="log", yscale="log", xlabel=SWEEPS[sweep], title=title)
        _ticks(axis, [entry["value"] for entry in entries], _percent if sweep == "share" else _thousands)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(figure, axes[0])
    return figure


def _accuracy(measurements: list[dict]) -> Figure:
    dtypes = list(dict.fromkeys(entry["workload"]["dtype"] for entry in measurements))
    figure, axes = plt.subplots(len(dtypes), 2, figsize=(10, 3.4 * len(dtypes)), layout="constrained", squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        entries = [entry for entry in measurements if entry["workload"]["dtype"] == dtype]
        for axis, (quantity, title) in zip(row, QUANTITIES.items(), strict=True):
            for name in STYLES:
                points = [
                    (1 - entry["confidence"], entry["relative_error"][name][quantity])
                    for entry in entries
                    if name in entry["relative_error"]
                ]
                _line(axis, name, points)
            axis.set(xscale="log", yscale="log", xlabel="probability of the label")
            axis.set_title(f"{dtype}: relative error of {title}")
            axis.invert_xaxis()
            _ticks(axis, [1 - entry["confidence"] for entry in entries], lambda value, _: f"{1 - value:g}")
    _legend(figure, axes[0][0])
    return figure


def _sharing(measurements: list[dict]) -> Figure:
    """Time and memory with shared prompts relative to separate ones, beside the share of tokens that is left."""
    entries = [entry for entry in measurements if entry["name"].startswith("ratio/")]
    sizes = [(entry["workload"]["prompt"], entry["workload"]["answer"]) for entry in entries]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    ratio = [prompt / answer for prompt, answer in sizes]
    for key, label, marker in (("median_seconds", "time", "o"), ("extra_mib", "peak memory", "s")):
        axis.plot(ratio, [entry["shared_to_separate"][key] for entry in entries], marker=marker, label=label)
    tokens = [(prompt + 2 * answer) / (2 * (prompt + answer)) for prompt, answer in sizes]
    axis.plot(ratio, tokens, color="#999999", linestyle=":", label="tokens")
    axis.axhline(1.0, color="#000000", linewidth=0.6)
    axis.set(xscale="log", xlabel="prompt tokens per answer token", ylabel="shared : separate", ylim=(0, 1.15))
    _ticks(axis, ratio, lambda value, _: f"{value:g}")
    axis.legend(frameon=False)
    return figure


def _real_model(groups: list[dict]) -> Figure:
    """The largest error of log-probs and entropies on a real model, by the probability of the token."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.0), layout="constrained")
    ticks = [float(i) for i in range(len(groups))]
    labels = ["{:g} to {:g}".format(*group["probability"]) for group in groups]
    for axis, (what, title) in zip(axes, (("logp", "log-probs"), ("entropy", "entropies")), strict=True):
        for name in STYLES:
            if what in groups[0]["error"].get(name, {}):
                _line(axis, name, [(i, group["error"][name][what]["max"]) for i, group in enumerate(groups)])
        axis.set(yscale="log", xlabel="probability of the token", title=f"largest error of {title} (nats)")
        _ticks(axis, ticks, lambda value, _: labels[round(value)])
    _legend(figure, axes[0])
    return figure


def _line(axis: Axes, name: str, points: Sequence[tuple[float, float]]) -> None:
    if not points:
        return
    color, marker, size = STYLES[name]
    ours = name == "cwdpo_kernels"
    axis.plot(
        *zip(*points, strict=True), color=color, marker=marker, label=name, linewidth=2.6 if ours else 1.3,
        markersize=size, zorder=3 if ours else 2, linestyle="--" if name.endswith("chunked") else "-",
    )  # fmt: skip


def _ticks(axis: Axes, values: list[float], formatter: Callable[[float, object], str]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(values))
    axis.xaxis.set_major_formatter(FuncFormatter(formatter))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _thousands(value: float, _: object) -> str:
    return f"{value / 1024:g}k" if value >= 8192 else f"{value:g}"


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.2g}%" if value < 1 else "100%"


def _legend(figure: Figure, axis: Axes) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
