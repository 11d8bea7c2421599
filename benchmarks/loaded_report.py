"""The section of docs/benchmarks.md about busy machines, from the suite `loaded`."""

from __future__ import annotations

from benchmarks.report_text import OURS, seconds, table


def section(report: dict) -> str:
    entries = report["measurements"]
    names = list(dict.fromkeys(name for entry in entries for name in entry["results"]))
    text = (
        f"The steps above beside {entries[0]['busy_processes']} processes that keep as many cores busy, started by the "
        f"benchmark. Cells are seconds, medians of interleaved runs. Machine: {report['environment']['device']}."
    )
    lines = []
    for entry in entries:
        times = [entry["results"].get(name) for name in names]
        lines.append(
            [
                entry["name"],
                *("" if result is None else seconds(result["median_seconds"]) for result in times),
                f"{entry['results'][OURS]['against_best_peer']:.2f}",
            ]
        )
    head = ["", *(f"**{name}**" if name == OURS else name for name in names), "ours vs fastest peer"]
    return "\n\n".join(["## On a busy machine", text, table(head, lines)])
