"""Names of the doctor's findings, which `stop_on` accepts. evaluation/doctor.py has the rules behind them."""

from __future__ import annotations

# The stages that each finding applies to.
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
    """Names of the findings that apply to `stage`, "sft" or "dpo"."""
    return [name for name, stages in STAGES_OF_FINDING.items() if stage in stages]
