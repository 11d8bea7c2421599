"""The names of the doctor's findings, for `stop_on`. The rules behind them are in evaluation/doctor.py."""

from __future__ import annotations

# Each finding, and the stages that can have it.
STAGES_OF_FINDING = {
    "not_finite": ("sft", "dpo"),
    "squeezing": ("dpo",),
    "margin_from_rejected": ("dpo",),
    "overconfidence": ("sft", "dpo"),
    "drift": ("dpo",),
    "all_cooled": ("dpo",),
    "no_cooling": ("dpo",),
    "easy_negatives_pushed": ("dpo",),
    "entropy_collapse": ("sft", "dpo"),
    "onpolicy_empty": ("dpo",),
    "nothing_kept": ("dpo",),
    "past_best": ("sft", "dpo"),
}


def finding_names(stage: str) -> list[str]:
    """The findings that `stage` ("sft" or "dpo") can have."""
    return [name for name, stages in STAGES_OF_FINDING.items() if stage in stages]
