"""Generates docs/benchmarks.md, its plots and the table of the README from the result files.

`python -m benchmarks.report`. The text depends only on the JSON files; a test fails if it is out of date.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks import entropy_report, gpu_report, loaded_report, results, sharing_report, trl_head_report, workloads
from benchmarks.report_text import OURS, mib, seconds, table
from benchmarks.results import ROOT

SUITES = (
    "linear", "loaded", "entropy", "real_model", "logits", "accuracy", "trainer", "sharing", "trl", "trl_head",
    "sweeps",
)  # fmt: skip
PAGE, IMAGES, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LABELS = {f"{OURS}, none kept": f"{OURS}, tiles recomputed"}  # names in the result files -> in tables
MODES = {
    "no_grad": "log-probs only, no gradient",
    "frozen": "forward and backward, frozen head",
    "trainable": "forward and backward, trainable head",
    "backward": "forward and backward",
}
ERRORS = {
    "logp": "log-probs", "loss": "loss", "grad_hidden": "grad hidden", "grad_weight": "grad weight",
    "grad_logits": "grad logits",
}  # fmt: skip
PLOTS = {
    "response": "One step with a frozen head, by answer length (one pair, 256 prompt tokens)",
    "vocab": "One step with a frozen head, by vocabulary size (one pair, answers of 64 tokens)",
    "share": "One step with a frozen head, by the share of answer tokens in sequences of 512 tokens (one pair)",
    "accuracy": "Relative error against float64, by the probability of the label",
    "sharing": sharing_report.PLOT,
    "real_model": entropy_report.PLOT,
}
SWEEPS = {  # name -> (heading, first cell of its table)
    "response": ("Answer length", "tokens per answer"),
    "vocab": ("Vocabulary size", "vocabulary size"),
    "share": ("Share of answer tokens", "share of answer tokens"),
}
Reports = dict[str, dict]


def load(folder: Path = results.FOLDER) -> Reports:
    return {suite: results.load(suite, folder) for suite in SUITES}


def main() -> None:
    from benchmarks import overview, plots  # here, because the text needs no matplotlib

    reports = load()
    plots.draw(reports, IMAGES)
    (IMAGES / "overview.svg").write_text(overview.svg(reports))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(reports))
    README.write_text(with_table(README.read_text(), reports))
    print(f"written: {PAGE}, {README}, {len(PLOTS)} plots in {IMAGES}")


def with_table(readme: str, reports: Reports) -> str:
    """The README with a new table between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{readme_table(reports)}\n{END}{after}"


def readme_table(reports: Reports) -> str:
    """Time and memory of a step at the size of SmolVLM, one row per implementation."""
    report = reports["linear"]
    found = {entry["name"]: entry for entry in report["measurements"]}
    columns = {
        "log-probs only": found["smolvlm/no_grad"]["results"],
        "frozen head": found["smolvlm/frozen"]["results"],
        "trainable head": found["smolvlm/trainable"]["results"],
        "frozen, bfloat16": found["smolvlm-bf16/frozen"]["results"],
        "trainable, bfloat16": found["smolvlm-bf16/trainable"]["results"],
    }
    bfloat16 = found["smolvlm-bf16/no_grad"]["results"]
    lines = [
        [bold(name)]
        + [time_and_memory(column[name]) if name in column else "" for column in columns.values()]
        + [error(bfloat16[name]["relative_error"]["logp"]) if name in bfloat16 else ""]
        for name in found["smolvlm/trainable"]["results"]
    ]
    ratios = [f"{column[OURS]['against_best_peer']:.2f}" for column in columns.values()]
    lines.append([f"{bold(OURS)}, time relative to the fastest peer", *ratios, ""])
    w = found["smolvlm/frozen"]["workload"]
    head = ["", *columns, "error of log-probs, bfloat16"]
    limits = ", ".join(f"{seconds(found[f'smolvlm/{mode}']['limit_seconds'])} s" for mode in workloads.MODES)
    return "\n".join(
        [
            table(head, lines),
            "",
            f"One CW-DPO step: {pairs(w)} of {w['tokens']} tokens, {w['response']} of them labeled; V {w['vocab']}, "
            f"D {w['dim']}; float32 unless stated otherwise. {report['environment']['device']}. Median time of "
            "interleaved runs, and peak memory above inputs and gradients. The matrix products that every method "
            f"needs took {limits} (log-probs only, frozen head, trainable head). Empty cells were not measured: "
            "implementations that project every token were not run in bfloat16. "
            f"{others({'linear': report})} All results, with plots: [docs/benchmarks.md](docs/benchmarks.md).",
        ]
    )


def page(reports: Reports) -> str:
    sections = [INTRODUCTION, machine(reports), linear(reports)]
    sections += [loaded_report.section(reports["loaded"]), entropy_report.section(reports["entropy"])]
    sections += [logits(reports), accuracy(reports), entropy_report.real_model(reports["real_model"])]
    sections += [trainer(reports), sharing_report.section(reports["sharing"], reports["trl"])]
    sections += [trl_head_report.section(reports["trl_head"]), sweeps(reports)]
    return "\n\n".join([*sections, *gpu_report.sections()]) + "\n"


INTRODUCTION = """# Benchmarks

`make bench` measures and writes `benchmarks/results/*_cpu.json`. `python -m benchmarks.report` generates this page from
those files, so do not edit it.

How to read the tables:

- **seconds**: the median of interleaved runs in one process, with quartiles in parentheses.
- **vs fastest peer**: our time divided by that of the fastest peer. Below 1, ours is faster.
- **of limit**: the limit divided by the time. The limit is the time of the necessary matrix products with torch (for
  logits, of a copy that moves as many bytes), measured in the same run. Above 100 %, the implementation is faster than
  that.
- **MiB**: peak resident memory above inputs and gradients, measured in a separate process.
- **error**: relative error against float64, in the 2-norm. It is checked before anything is timed: if an error of ours
  exceeds its tolerance, nothing is reported.

Peers are called the way their own projects call them on this device (`benchmarks/peers.py`). Liger's loss is plain DPO,
which costs the same."""


def machine(reports: Reports) -> str:
    environment = reports["linear"]["environment"]
    lines = [
        f"{environment['device']}; backend `{environment['backend']}`, Python {environment['python']}.",
        "",
        table(["package", "version"], environment["versions"].items()),
    ]
    for name, reason in environment["cannot_run_here"].items():
        lines += ["", f"Not run on this machine: {name} ({reason})."]
    commits = sorted({short(entry["commit"]) for report in reports.values() for entry in report["measurements"]})
    return "\n".join(["## Machine", "", *lines, "", f"Measured at commit {', '.join(commits)}. {others(reports)}"])


def short(commit: str) -> str:
    """The first twelve digits of a commit, and "+changes" if the code differed from it."""
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes


def others(reports: Reports) -> str:
    """How much other processes may have disturbed the measurements."""
    quiet = [report for suite, report in reports.items() if suite != "loaded"]
    shares = [entry["others"] for report in quiet for entry in report["measurements"] if "others" in entry]
    typical, most = statistics.median(shares), max(shares)
    return f"Other processes used {typical:.0%} of the CPU time during the runs (median), at most {most:.0%}."


def linear(reports: Reports) -> str:
    sections = ["## From hidden states to the loss"]
    for entry in reports["linear"]["measurements"]:
        w = entry["workload"]
        size = f"{pairs(w)} of {w['tokens']} tokens, {w['response']} labeled; V {w['vocab']}, D {w['dim']}"
        limit = f"Limit: {seconds(entry['limit_seconds'])} s (products for {', '.join(products(entry))})."
        sections.append(f"### {w['name']}: {MODES[entry['mode']]}\n\n{size}, {w['dtype']}. {limit}")
        sections.append(comparison(entry["results"]))
    return "\n\n".join(sections)


def pairs(workload: dict) -> str:
    return f"{workload['pairs']} pair{'s' * (workload['pairs'] != 1)}"


def products(entry: dict) -> list[str]:
    names = {"no_grad": 1, "frozen": 2, "trainable": 3}
    return ["logits", "grad hidden", "grad weight"][: names[entry["mode"]]]


def logits(reports: Reports) -> str:
    memory = "Here memory includes the gradient, because that is what `reuse_logits` saves."
    sections = ["## From logits to log-probs", memory]
    for entry in reports["logits"]["measurements"]:
        w = entry["workload"]
        limit = f"Limit: {seconds(entry['limit_seconds'])} s (a copy of as many bytes)."
        size = f"{w['tokens']} tokens; V {w['vocab']}, {w['dtype']}"
        sections.append(f"### {w['name']}: {MODES[entry['mode']]}\n\n{size}. {limit}")
        sections.append(comparison(entry["results"]))
    return "\n\n".join(sections)


def comparison(measured: dict[str, dict]) -> str:
    """Time, ratios, memory and errors, one row per implementation."""
    kinds = [kind for kind in ERRORS if any(kind in result["relative_error"] for result in measured.values())]
    lines = []
    for name, result in measured.items():
        low, high = result["quartiles"]
        ratio = result.get("against_best_peer")
        lines.append(
            [
                bold(name),
                f"{seconds(result['median_seconds'])} ({seconds(low)} to {seconds(high)})",
                "" if ratio is None else f"{ratio:.2f}",
                f"{result['of_limit']:.0%}",
                mib(result["extra_mib"]),
                *(error(result["relative_error"].get(kind)) for kind in kinds),
            ]
        )
    head = ["", "seconds", "vs fastest peer", "of limit", "MiB", *(f"error: {ERRORS[kind]}" for kind in kinds)]
    return table(head, lines)


def accuracy(reports: Reports) -> str:
    """One table per dtype and quantity: a row per implementation, a column per probability of the label."""
    entries = reports["accuracy"]["measurements"]
    w = entries[0]["workload"]
    size = f"{w['tokens']} tokens, V {w['vocab']}, D {w['dim']}. The gradients are those of the sum of the log-probs"
    sections = ["## Accuracy over confidence", plot("accuracy"), f"{PLOTS['accuracy']}. {size}."]
    for dtype in dict.fromkeys(entry["workload"]["dtype"] for entry in entries):
        chosen = [entry for entry in entries if entry["workload"]["dtype"] == dtype]
        for kind in ("logp", "grad_hidden", "grad_weight"):
            lines = [
                [bold(name), *(error(entry["relative_error"][name][kind]) for entry in chosen)]
                for name in chosen[0]["relative_error"]
            ]
            head = [f"{dtype}, {ERRORS[kind]}", *(f"p = {entry['confidence']}" for entry in chosen)]
            sections.append(table(head, lines))
    return "\n\n".join(sections)


def trainer(reports: Reports) -> str:
    entries = reports["trainer"]["measurements"]
    w = entries[0]["workload"]
    lines = [
        [
            f"{'trainable' if entry['trainable_head'] else 'frozen'} head, {bold(path, 'fused')}",
            f"{result['pairs_per_second']:.2f}",
            seconds(result["median_seconds"]),
            mib(result["extra_mib"]),
        ]
        for entry in entries
        for path, result in entry["results"].items()
    ]
    text = (
        f"`CWDPOTrainer` with a LLaVA of {w['layers']} layers (D {w['dim']}, V {w['vocab']}, "
        f"{(w['image_size'] // 8) ** 2} tokens per image) and {pairs(w)} per step, with answers of {w['response']} "
        "tokens. A step includes data loading, reference, forward, backward and optimizer. Memory is the peak of a "
        "step above the memory before it, gradients included."
    )
    return "\n\n".join(["## A step of the trainer", text, table(["", "pairs per second", "seconds", "MiB"], lines)])


def sweeps(reports: Reports) -> str:
    sections = ["## Scaling with answer length, vocabulary and share of answer tokens"]
    for sweep, (heading, first_cell) in SWEEPS.items():
        entries = [entry for entry in reports["sweeps"]["measurements"] if entry["sweep"] == sweep]
        w = entries[0]["workload"]
        fixed = f"D {w['dim']}, {w['dtype']}" + ("" if sweep == "vocab" else f", V {w['vocab']}")
        sections += [f"### {heading}", plot(sweep), f"{PLOTS[sweep]}; {fixed}. Cells: seconds, MiB."]
        names = dict.fromkeys(name for entry in entries for name in entry["results"])
        lines = [
            [bold(name), *(time_and_memory(entry["results"].get(name), units=False) for entry in entries)]
            for name in names
        ]
        sections.append(table([first_cell, *(axis_value(sweep, entry["value"]) for entry in entries)], lines))
    return "\n\n".join(sections)


def plot(name: str) -> str:
    return f"![{PLOTS[name]}](images/{name}.svg)"


def axis_value(sweep: str, value: float) -> str:
    return f"{value:.1%}" if sweep == "share" else f"{value}"


def bold(name: str, ours: str = OURS) -> str:
    """The name of an implementation as the tables show it: ours in bold."""
    label = LABELS.get(name, name)
    return f"**{label}**" if name.startswith(ours) else label


def time_and_memory(result: dict | None, units: bool = True) -> str:
    if result is None:
        return ""
    time, memory = seconds(result["median_seconds"]), mib(result["extra_mib"])
    return f"{time} s, {memory} MiB" if units else f"{time}, {memory}"


def error(value: float | None) -> str:
    if value is None:
        return ""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


if __name__ == "__main__":
    main()
