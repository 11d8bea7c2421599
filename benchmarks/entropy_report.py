"""The sections of docs/benchmarks.md about entropies: their time and memory, and errors on a real model."""

from __future__ import annotations

from benchmarks.report_text import OURS, mib, seconds, table

PLOT = (
    "Largest error of log-probs and entropies on SmolLM2-135M's hidden states in bfloat16, by the token's probability"
)
MODES = {
    "frozen": "frozen head", "trainable": "trainable head", "reported": "frozen head, entropy without gradient",
}  # fmt: skip


def section(report: dict) -> str:
    """Time and memory of log-probs and entropies with gradients."""
    entries = report["measurements"]
    names = list(dict.fromkeys(name for entry in entries for name in entry["results"]))
    text = (
        "Log-probs and entropies with gradients, as policy gradients with an entropy bonus need them "
        "(`token_stats`): seconds / MiB. In the rows without the entropy's gradient it is only reported, as most "
        "trainers do. Cut-cross-entropy has no entropy, so its column is the step without it; the ratio leaves it out."
    )
    lines = []
    for entry in entries:
        found, w = entry["results"], entry["workload"]
        cells = [time_and_memory(found[name]) if name in found else "" for name in names]
        title = f"{w['name']}, {MODES[entry['mode']]}"
        lines.append([title, *cells, f"{found[OURS]['against_best_peer']:.2f}"])
    head = ["", *(f"**{name}**" if name == OURS else name for name in names), "vs fastest peer"]
    return "\n\n".join(["## Entropy with a gradient", text, table(head, lines)])


def time_and_memory(result: dict) -> str:
    return f"{seconds(result['median_seconds'])} / {mib(result['extra_mib'])}"


def real_model(report: dict) -> str:
    """Errors on a real model's hidden states."""
    entry = report["measurements"][0]
    w, groups = entry["workload"], entry["groups"]
    text = (
        f"The next-token log-probs and entropies of {entry['name']} reading this documentation: {w['tokens']} tokens, "
        f"V {w['vocab']}, D {w['dim']}, hidden states and head in bfloat16. Cells are the largest error in nats "
        "against float64 on the same numbers."
    )
    parts = [f"## Errors on a real model\n\n{text}", f"![{PLOT}](images/real_model.svg)"]
    for what, title in (("logp", "Log-probs"), ("entropy", "Entropies")):
        names = [name for name, errors in groups[0]["error"].items() if what in errors]
        lines = [
            [*title_of(group), *(f"{group['error'][name][what]['max']:.1e}" for name in names)] for group in groups
        ]
        head = ["probability of the token", "tokens", *(f"**{name}**" if name == OURS else name for name in names)]
        parts.append(f"### {title}\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def title_of(group: dict) -> list[str]:
    low, high = group["probability"]
    return [f"{low:g} to {high:g}", str(group["tokens"])]
