"""Tables and pictures of the result files: docs/benchmarks.md, docs/images and the table of the README.

`python -m benchmarks.report`. The text depends on nothing but the JSON; a test fails where the two differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import results, workloads
from benchmarks.results import ROOT

SUITES = ("linear", "logits", "accuracy", "trainer", "sweeps")
PAGE, IMAGES, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images", ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
OURS = "cwdpo_kernels"
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
PICTURES = {
    "response": "A step with a frozen head over the length of the answers (one pair, 256 tokens before them)",
    "vocab": "The same over the vocabulary (answers of 64 tokens)",
    "share": "The same over the share of the answer in sequences of 512 tokens",
    "accuracy": "Relative error against float64 over the confidence of the tokens",
}
Reports = dict[str, dict]


def load(folder: Path = results.FOLDER) -> Reports:
    return {suite: results.load(suite, folder) for suite in SUITES}


def main() -> None:
    from benchmarks import overview, pictures  # matplotlib: the text does without

    reports = load()
    pictures.draw(reports, IMAGES)
    (IMAGES / "overview.svg").write_text(overview.svg(reports))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(reports))
    README.write_text(with_table(README.read_text(), reports))
    print(f"written: {PAGE}, {README}, {len(PICTURES)} pictures in {IMAGES}")


def with_table(readme: str, reports: Reports) -> str:
    """The README with everything between its markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{readme_table(reports)}\n{END}{after}"


def readme_table(reports: Reports) -> str:
    """Time and memory of a step of SmolVLM's size, one line an implementation."""
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
    lines.append([f"{bold(OURS)}, time over the fastest peer's", *ratios, ""])
    w = found["smolvlm/frozen"]["workload"]
    head = ["", *columns, "error of log-probs, bfloat16"]
    limits = ", ".join(f"{seconds(found[f'smolvlm/{mode}']['limit_seconds'])} s" for mode in workloads.MODES)
    return "\n".join(
        [
            table(head, lines),
            "",
            f"{report['environment']['device']}; {w['pairs']} pairs of {w['tokens']} tokens, {w['response']} of them "
            f"labelled, V {w['vocab']}, D {w['dim']}; float32 where nothing else is said. Medians of interleaved "
            "repetitions, and peak memory over inputs and gradients. The matrix products that no method can do "
            f"without took {limits} (log-probs, frozen, trainable head). Empty: projects every token, not run in "
            f"bfloat16. {others({'linear': report})} More, with pictures: [docs/benchmarks.md](docs/benchmarks.md).",
        ]
    )


def page(reports: Reports) -> str:
    sections = [INTRODUCTION, machine(reports), linear(reports), logits(reports), accuracy(reports)]
    return "\n\n".join([*sections, trainer(reports), sweeps(reports)]) + "\n"


INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results/*_cpu.json`, which `make bench` writes: do not edit.

- Every implementation is compared with float64 first; a run in which ours is off reports nothing.
- Repetitions are interleaved in one process. Times are medians, with quartiles in brackets, in seconds.
- "limit" is the share of the time that torch's own matrix products (or, for logits, a copy of the bytes moved) take,
  measured in the same run: above 100 % is faster than these.
- Memory is the peak of resident memory over inputs and gradients, measured in a process of its own, in MiB.
- "best peer" is the time over that of the fastest peer: below 1 is faster than all of them.
- Peers are called as their own projects call them on this device (`benchmarks/peers.py`). Liger's loss is plain DPO,
  which costs the same."""


def machine(reports: Reports) -> str:
    environment = reports["linear"]["environment"]
    lines = [
        f"{environment['device']}; backend `{environment['backend']}`, Python {environment['python']}.",
        "",
        table(["package", "version"], environment["versions"].items()),
    ]
    for name, reason in environment["cannot_run_here"].items():
        lines += ["", f"Not run here: {name} ({reason})."]
    commits = sorted({short(entry["commit"]) for report in reports.values() for entry in report["measurements"]})
    return "\n".join(["## Machine", "", *lines, "", f"Measured at commit {', '.join(commits)}. {others(reports)}"])


def short(commit: str) -> str:
    """Twelve digits, and whether the code differed."""
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes


def others(reports: Reports) -> str:
    shares = [entry["others"] for report in reports.values() for entry in report["measurements"] if "others" in entry]
    typical, most = statistics.median(shares), max(shares)
    return f"Other processes took {typical:.0%} of the CPUs' time during the repetitions (median), {most:.0%} at most."


def linear(reports: Reports) -> str:
    sections = ["## From hidden states to the loss"]
    for entry in reports["linear"]["measurements"]:
        w = entry["workload"]
        size = f"{w['pairs']} pairs of {w['tokens']} tokens, {w['response']} labelled; V {w['vocab']}, D {w['dim']}"
        limit = f"Limit, {' + '.join(products(entry))}: {seconds(entry['limit_seconds'])} s."
        sections.append(f"### {w['name']}: {MODES[entry['mode']]}\n\n{size}, {w['dtype']}. {limit}")
        sections.append(comparison(entry["results"]))
    return "\n\n".join(sections)


def products(entry: dict) -> list[str]:
    names = {"no_grad": 1, "frozen": 2, "trainable": 3}
    return ["logits", "grad hidden", "grad weight"][: names[entry["mode"]]]


def logits(reports: Reports) -> str:
    sections = ["## From logits to log-probs", "Memory includes the gradient here: `reuse_logits` is about it."]
    for entry in reports["logits"]["measurements"]:
        w = entry["workload"]
        limit = f"Limit, a copy of as many bytes: {seconds(entry['limit_seconds'])} s."
        size = f"{w['tokens']} tokens; V {w['vocab']}, {w['dtype']}"
        sections.append(f"### {w['name']}: {MODES[entry['mode']]}\n\n{size}. {limit}")
        sections.append(comparison(entry["results"]))
    return "\n\n".join(sections)


def comparison(measured: dict[str, dict]) -> str:
    """Time, ratios, memory and errors, one line an implementation."""
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
    return table(["", "s", "best peer", "limit", "MiB", *(f"error: {ERRORS[kind]}" for kind in kinds)], lines)


def accuracy(reports: Reports) -> str:
    """One table a dtype and quantity: implementations over confidence."""
    entries = reports["accuracy"]["measurements"]
    w = entries[0]["workload"]
    size = f"{w['tokens']} tokens, V {w['vocab']}, D {w['dim']}; gradients of the summed log-prob"
    sections = ["## Accuracy over confidence", picture("accuracy"), f"{PICTURES['accuracy']}. {size}."]
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
        f"`CWDPOTrainer` on a LLaVA of {w['layers']} layers (hidden {w['dim']}, V {w['vocab']}, pictures of "
        f"{(w['image_size'] // 8) ** 2} tokens), {w['pairs']} pairs with answers of {w['response']} tokens a step: "
        "loading, reference, forward, backward, optimizer. Memory is the peak of a step over what is "
        "resident before it, gradients included."
    )
    return "\n\n".join(["## A step of the trainer", text, table(["", "pairs / s", "s", "MiB"], lines)])


def sweeps(reports: Reports) -> str:
    sections = ["## Over answer length, vocabulary and share of the answer"]
    for sweep in ("response", "vocab", "share"):
        entries = [entry for entry in reports["sweeps"]["measurements"] if entry["sweep"] == sweep]
        w = entries[0]["workload"]
        fixed = f"D {w['dim']}, {w['dtype']}" + ("" if sweep == "vocab" else f", V {w['vocab']}")
        sections += [f"### {sweep}", picture(sweep), f"{PICTURES[sweep]}; {fixed}. Seconds, MiB."]
        names = dict.fromkeys(name for entry in entries for name in entry["results"])
        lines = [
            [bold(name), *(time_and_memory(entry["results"].get(name), units=False) for entry in entries)]
            for name in names
        ]
        sections.append(table([sweep, *(axis_value(sweep, entry["value"]) for entry in entries)], lines))
    return "\n\n".join(sections)


def picture(name: str) -> str:
    return f"![{PICTURES[name]}](images/{name}.svg)"


def axis_value(sweep: str, value: float) -> str:
    return f"{value:.1%}" if sweep == "share" else f"{value}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def bold(name: str, ours: str = OURS) -> str:
    return f"**{name}**" if name.startswith(ours) else name


def time_and_memory(result: dict | None, units: bool = True) -> str:
    if result is None:
        return ""
    time, memory = seconds(result["median_seconds"]), mib(result["extra_mib"])
    return f"{time} s, {memory} MiB" if units else f"{time}, {memory}"


def seconds(value: float) -> str:
    """Two significant digits down to a millisecond; never in powers of ten."""
    decimals = next((d for d, least in ((0, 10), (1, 1), (2, 0.1), (3, 0.01)) if value >= least), 4)
    return f"{value:.{decimals}f}"


def mib(value: float) -> str:
    return f"{max(value, 0.0):.{0 if value >= 10 else 1}f}"


def error(value: float | None) -> str:
    if value is None:
        return ""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


if __name__ == "__main__":
    main()
