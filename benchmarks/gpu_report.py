"""The section of docs/benchmarks.md about GPUs, from benchmarks/results/gpu_*.json (copies of a run's gpu.json)."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import cycles, gpu_plan, report, results
from benchmarks.models import SHAPES

MODES = {"no_grad": "log-probs only", "frozen": "frozen head", "trainable": "trainable head"}
# Rows of ours: name in the table -> mode -> op in the file.
OURS = {
    "cwdpo_kernels": {mode: mode for mode in MODES},
    "cwdpo_kernels, tiles recomputed": {"trainable": "trainable, none kept"},
    "cwdpo_kernels, 4 GiB of tiles kept": {"trainable": "trainable, 4 GiB kept"},
}
PRODUCTS = {  # the matrix products that every method needs
    "no_grad": ("logits",),
    "frozen": ("logits", "grad_hidden"),
    "trainable": ("logits", "grad_hidden", "grad_weight"),
}
OTHER_OPS = (*gpu_plan.OTHER, *gpu_plan.LOGITS)

INTRODUCTION = """## On a GPU

`python -m benchmarks.gpu --out DIR` measures. A cell is the median time of a step by CUDA events, and the peak of
allocated memory above the inputs. A step is a forward pass for log-probs only, else forward and backward. The GPU is
kept busy while a step is launched, so launches do not count unless a step waits for the GPU. All tokens are labeled;
hidden states and head are bfloat16. "Matrix products alone" is the time of the products that every method needs, with
`torch.mm`. "Predicted" is what `benchmarks/cycles.py` makes of the kernels' machine code and the clock that the first
shape's products imply, and how much that is of the measured time."""


def sections(folder: Path = results.FOLDER) -> list[str]:
    """The section of every result file, with one table per shape."""
    reports = {path: json.loads(path.read_text()) for path in sorted(folder.glob("gpu_*.json"))}
    for path, found in reports.items():
        if found["environment"].get("simulated"):
            raise ValueError(f"{path}: expected results of a GPU, got a simulation")
    return [INTRODUCTION, *(text for found in reports.values() for text in of_device(found))] if reports else []


def of_device(found: dict) -> list[str]:
    machine = found["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    texts = [f"### {machine['device']}", f"Measured at commit {machine['commit'][:12]} with {versions}.", values(found)]
    measured = {*found["limits"], *(row["shape"] for row in found["measurements"])}
    texts += [of_shape(found, shape.name) for shape in SHAPES if shape.name in measured]
    return [*texts, *shared(found), *not_run(found)]


def shared(found: dict) -> list[str]:
    """Steps with shared prompts, beside those with a prompt before each answer."""
    cells = {(row["lengths"], row["way"]): row for row in found.get("shared", ())}
    lines = []
    for lengths in dict.fromkeys(lengths for lengths, _ in cells):
        both = [cells[lengths, way] for way in ("separate", "shared") if (lengths, way) in cells]
        if len(both) == 2:  # a run that was cut may have one
            separate, once = both
            times = [f"{row['ms']:.0f} ms, {row['extra_gib']:.1f} GiB" for row in both]
            ratios = [f"{once[key] / separate[key]:.2f}" for key in ("ms", "extra_gib")]
            lines.append([lengths, *times, *ratios])
    head = ["prompt : answer tokens", "separate", "shared", "time, shared : separate", "memory, shared : separate"]
    text = "Shared prompts: a step of one pair on a Llama of 4 layers (D 2048, V 151936, bfloat16) that trains q and v."
    return [f"{text}\n\n{report.table(head, lines)}"] if lines else []


def values(found: dict) -> str:
    """Errors of linear_logprob against float64, beside eager's in the same dtype."""
    cells = [[x["case"], x["value"], report.error(x["error"]), report.error(x["eager_error"])] for x in found["values"]]
    return report.table(["inputs", "value", "relative error", "of eager, same dtype"], cells)


def of_shape(found: dict, name: str) -> str:
    (shape,) = (shape for shape in SHAPES if shape.name == name)
    cells = {
        row["op"]: f"{row['ms']:.2f} ms, {row['extra_gib']:.2f} GiB"
        for row in found["measurements"]
        if row["shape"] == name
    }
    gemm = found["limits"].get(name, {}).get("gemm_ms")  # a run that was cut may have none
    lines = [[report.bold(ours), *(cells.get(ops.get(mode, ""), "") for mode in MODES)] for ours, ops in OURS.items()]
    peers = dict.fromkeys(op.rsplit(", ", 1)[0] for op in cells if op.endswith((", frozen", ", trainable")))
    lines += [[peer, *(cells.get(f"{peer}, {mode}", "") for mode in MODES)] for peer in peers]
    if gemm:
        alone = (sum(gemm[product] for product in products) for products in PRODUCTS.values())
        lines.append(["matrix products alone", *(f"{ms:.2f} ms" for ms in alone)])
    lines += predicted(found, name)
    text = f"**{name}**: {shape.tokens} tokens, V {shape.vocab}, D {shape.dim}"
    text += f"\n\n{report.table(['', *MODES.values()], lines)}"
    others = "; ".join(f"`{op}` {cells[op]}" for op in OTHER_OPS if op in cells)
    return f"{text}\n\nOther ops: {others}." if others else text


def predicted(found: dict, name: str) -> list[list[str]]:
    """The lines of predictions for a shape; they need the products of the first shape."""
    first = SHAPES[0]
    gemm = found["limits"].get(first.name, {}).get("gemm_ms")
    if not gemm or found["environment"].get("simulated"):
        return []
    expected = cycles.predicted_ms(sum(gemm.values()), first)
    measured = {row["op"]: row["ms"] for row in found["measurements"] if row["shape"] == name}

    def cell(op: str | None) -> str:
        if op is None or op not in measured:
            return ""
        return f"{expected[name, op]:.2f} ms, {expected[name, op] / measured[op]:.2f}"

    lines = [[f"{ours}: predicted", *(cell(ops.get(mode)) for mode in MODES)] for ours, ops in OURS.items()]
    return [line for line in lines if any(line[1:])]


def not_run(found: dict) -> list[str]:
    """What failed, once for all shapes and modes, with the reason."""
    reasons: dict[str, str] = {}
    for failed, reason in found["failed"].items():
        name = failed
        for shape in SHAPES:
            name = name.removeprefix(f"{shape.name}, ")
        for mode in MODES:
            name = name.removesuffix(f", {mode}")
        reasons.setdefault(name, reason.split(". ")[0])
    return [f"Did not run: {name} (`{reason}`)." for name, reason in reasons.items()]
