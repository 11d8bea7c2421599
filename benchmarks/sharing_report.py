"""The section of docs/benchmarks.md about shared prompts, from the suites `sharing` and `trl`."""

from __future__ import annotations

from benchmarks.report_text import mib, seconds, table

PLOT = "Time and memory of a step with shared prompts, relative to a step with separate ones (one pair)"


def section(report: dict, trl: dict) -> str:
    """Tables by prompt length and by number of answers, the pair with an image, and TRL's trainer."""
    found = {entry["name"]: entry for entry in report["measurements"]}
    ratios = [entry for name, entry in found.items() if name.startswith("ratio/")]
    answers = [entry for name, entry in found.items() if name.startswith("answers/")]
    w = ratios[0]["workload"]
    text = (
        f"A step on a Llama of {w['layers']} layers (D {w['dim']}, V {w['vocab']}, {w['heads']} heads, {w['groups']} "
        "key-value heads) that trains q and v: the reference's log-probs, forward, loss and backward. *Separate*: each "
        "answer is a row with its own copy of the prompt. *Shared*: each prompt is encoded once for all its answers "
        "(token trees). Nothing is timed unless both give the same gradients. Memory is the peak above the loaded "
        f"model and its gradients. Machine: {report['environment']['device']}."
    )
    parts = ["## Shared prompts", text, f"![{PLOT}](images/sharing.svg)"]
    parts.append(table(["prompt : answer tokens", *HEAD], [_line(_lengths(entry), entry) for entry in ratios]))
    parts.append("One prompt of 256 tokens and several rejected answers of 64 tokens. *Separate* has a pair for each:")
    parts.append(
        table(["rejected answers", *HEAD], [_line(str(entry["workload"]["rejected"]), entry) for entry in answers])
    )
    if "image" in found:
        parts.append(
            f"A LLaVA with the same language model, an image of {found['image']['workload']['patches'] ** 2} tokens in "
            "the prompt, and a frozen vision tower of 6 layers:"
        )
        parts.append(table(["prompt : answer tokens", *HEAD], [_line(_lengths(found["image"]), found["image"])]))
    parts += _against_trl(trl)
    busiest = max(entry["others"] for entry in (*report["measurements"], *trl["measurements"]))
    parts.append(f"Other processes used at most {busiest:.0%} of the CPU time during a measurement.")
    return "\n\n".join(parts)


def _against_trl(trl: dict) -> list[str]:
    text = (
        "A whole step of one pair in TRL on the same models with LoRA on q and v: data, reference (LoRA off), policy, "
        "loss, backward and optimizer. With `constant=1.0`, `CoolingDPOTrainer` computes the same loss as TRL; nothing "
        "is reported unless all trainers log the same losses. Memory is the peak of a step above the memory before it."
    )
    lines = [
        [entry["name"], way, f"{seconds(result['median_seconds'])} s", f"{mib(result['extra_mib'])} MiB",
         *(f"{entry['to_trl'][way][key]:.2f}" if way in entry["to_trl"] else "" for key in RATIOS)]
        for entry in trl["measurements"]
        for way, result in entry["results"].items()
    ]  # fmt: skip
    return [text, table(["prompt", "trainer", "time", "memory", "time / TRL", "memory / TRL"], lines)]


RATIOS = ("median_seconds", "extra_mib")
HEAD = ("separate", "shared", "time, shared / separate", "memory, shared / separate")


def _lengths(entry: dict) -> str:
    return f"{entry['workload']['prompt']} : {entry['workload']['answer']}"


def _line(first: str, entry: dict) -> list[str]:
    cells = [
        f"{seconds(result['median_seconds'])} s, {mib(result['extra_mib'])} MiB" for result in entry["results"].values()
    ]
    ratio = entry["shared_to_separate"]
    return [first, *cells, f"{ratio['median_seconds']:.2f}", f"{ratio['extra_mib']:.2f}"]
