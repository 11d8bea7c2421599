"""The section of docs/benchmarks.md about TRL's trainers with our head, from the suite `trl_head`."""

from __future__ import annotations

from benchmarks.report_text import table

HEAD = (
    "trainer", "float32: losses", "float32: weights", "bfloat16, losses: TRL's head", "ours",
    "bfloat16, weights: TRL's head", "ours",
)  # fmt: skip


def section(report: dict) -> str:
    entries = report["measurements"]
    environment = report["environment"]
    trl, device, steps = environment["versions"]["trl"], environment["device"], entries[0]["steps"]
    text = (
        f"The trainers of TRL {trl} with its own head and with ours (`use_fused_head()`): {steps} steps of a "
        "tiny Llama that has learned a small language, from the same weights and with the same batches. "
        "*float32*: how far the two runs are apart. *bfloat16* (autocast): how far each run is from that of "
        "TRL's head in float32. *losses*: the largest difference in float32, relative to the loss if that is "
        "above 1, and the mean difference in bfloat16. *weights*: the distance of the updates, relative to "
        "the update. Nothing is reported if the losses in float32 differ by more than 1e-5. GRPO and RLOO get "
        f"fixed completions, because samples would differ after the first rounding. Machine: {device}."
    )
    return "\n\n".join(["## TRL's trainers with our head", text, table(HEAD, map(_line, entries)), _summary(entries)])


def _line(entry: dict) -> list[str]:
    theirs, ours = entry["bfloat16"].values()
    errors = [theirs["loss"], ours["loss"], theirs["update"], ours["update"]]
    return [
        entry["name"],
        *(f"{entry['float32'][key]:.0e}" for key in ("loss", "update")),
        *(f"{x:.1e}" for x in errors),
    ]


def _summary(entries: list[dict]) -> str:
    parts = []
    for key, what in (("loss", "losses"), ("update", "weights")):
        ratios = [ours[key] / theirs[key] for theirs, ours in (entry["bfloat16"].values() for entry in entries)]
        nearer = sum(ratio < 1 for ratio in ratios)
        parts.append(
            f"by {what}, ours is nearer to float32 in {nearer} of {len(ratios)} cases "
            f"(error relative to that of TRL's head: {min(ratios):.2f} to {max(ratios):.2f})"
        )
    return f"In bfloat16: {'; '.join(parts)}."
