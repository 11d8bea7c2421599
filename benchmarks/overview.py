"""The plot at the top of the README: time and memory of one step, one row per implementation.

It is written as SVG text, so that equal results give equal bytes everywhere and a test can compare them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.report import OURS, Reports, mib, seconds

STEP = "smolvlm/frozen"
WIDTH, TOP, ROW, FOOT = 720, 66, 27, 12
PANELS = {"median_seconds": 248, "extra_mib": 496}  # x of each axis
AXIS = 168
TITLES = {"median_seconds": "seconds per step (log scale)", "extra_mib": "extra memory, MiB (log scale)"}
FORMATS: dict[str, Callable[[float], str]] = {"median_seconds": seconds, "extra_mib": mib}
STYLE = """text { font: 13px system-ui, sans-serif; fill: #333 } line { stroke: #ddd } circle { fill: #8a97a0 }
.title { font-weight: 600 } .note { font-size: 12px; fill: #666 } .ours { font-weight: 700 }
.stem { stroke: #8a97a0; stroke-width: 2 } .stem.ours { stroke: #00796b; stroke-width: 3 }
circle.ours { fill: #00796b }"""


def svg(reports: Reports) -> str:
    """A lollipop chart with logarithmic axes, fastest first."""
    (entry,) = (entry for entry in reports["linear"]["measurements"] if entry["name"] == STEP)
    results = sorted(entry["results"].items(), key=lambda item: item[1]["median_seconds"])
    height = TOP + ROW * len(results) + FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{title(entry)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="white"/>',
        f'<text class="note" x="16" y="24">{title(entry)}</text>',
    ]
    for key, left in PANELS.items():
        lines.append(f'<text class="title" x="{left}" y="50">{TITLES[key]}</text>')
        lines.append(f'<line x1="{left}" x2="{left}" y1="{TOP - 4}" y2="{height - FOOT}"/>')
    for index, (name, result) in enumerate(results):
        y = TOP + ROW * index + ROW // 2
        ours = " ours" if name.startswith(OURS) else ""
        lines.append(f'<text class="{ours.strip()}" x="16" y="{y + 4}">{name}</text>')
        for key, left in PANELS.items():
            values = [each[key] for _, each in results]
            x = left + position(result[key], min(values), max(values))
            lines.append(f'<line class="stem{ours}" x1="{left}" x2="{x:.1f}" y1="{y}" y2="{y}"/>')
            lines.append(f'<circle class="{ours.strip()}" cx="{x:.1f}" cy="{y}" r="5"/>')
            label = FORMATS[key](result[key])
            lines.append(f'<text class="{ours.strip()}" x="{x + 10:.1f}" y="{y + 4}">{label}</text>')
    return "\n".join([*lines, "</svg>", ""])


def title(entry: dict) -> str:
    w = entry["workload"]
    return (
        f"CW-DPO step with a frozen head on a CPU, {w['dtype']}: {w['pairs']} pairs of {w['tokens']} tokens, "
        f"{w['response']} labeled, V {w['vocab']}, D {w['dim']}"
    )


def position(value: float, least: float, most: float) -> float:
    """The position of a value on a logarithmic axis that starts a little below the smallest value."""
    start = math.log(least) - 0.15 * math.log(most / least)
    return AXIS * (math.log(value) - start) / (math.log(most) - start)
