"""The doctor: looks for known problems in a stage's metrics, and reports the evidence and what may help.

Each rule is a function of a `StageHistory`. It returns (evidence, advice), or None if all is well. A missing or NaN
metric makes every comparison false, so a rule without data finds nothing; `not_finite` finds metrics that are NaN. A
finding is a reason to look, not a proof. The thresholds and their reasons are below.

Rules on held-out answers ignore sets of fewer than `MIN_ANSWERS`, and find nothing if there are fewer chosen answers.
`too_few` says so. Every finding ends its evidence with n: the answers of each set, or the training steps, that it is
based on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import TrainerCallback

from cwdpo_kernels import CoolingWeighted
from cwdpo_trainer.config.findings import finding_names
from cwdpo_trainer.evaluation.history import MIN_ANSWERS, History, StageHistory, probe_entries
from cwdpo_trainer.reporter import say

# In a healthy stage 2, log-probs of chosen answers move by about 0.01 nats per token (measured on the digits task).
FALL = 0.02  # nats per token, of chosen answers
SLIP = 0.1  # nats per answer, of chosen answers: they lose a tenth of their probability
MARGIN_RISE = 0.1  # nats per answer, between chosen and rejected held-out answers
TOP1_RISE = 0.005  # probability
# The paper reports an ECE of 0.08 to 0.10 for CW-DPO and 0.25 for DPO. The digits task starts near 0.01.
ECE_RISE = 0.03
# The paper reports TV 0.15 and JS 0.10 for CW-DPO, TV 0.45 and JS 0.30 for DPO. These are half-way.
TV_HIGH = 0.3
JS_HIGH = 0.2  # nats, of at most ln 2
COOLED = 0.05  # mean w_c: the push on a negative is 20 times weaker than in DPO
UNCOOLED = 0.95
EASY_GAP = 2.0  # nats per token below the chosen answers: each token is e^2 = 7 times less likely
EASY_PUSH = 0.5  # w_c
ENTROPY_LEFT = 0.5  # share of the entropy at the start
ENTROPY_SOME = 0.02  # nats; a model that starts with less has none to lose
ONPOLICY_SHARE = 0.1  # of the on-policy negatives that onpolicy_fraction asks for
KEPT_FEW = 0.05  # share of the pairs
PAST_BEST = 2  # probes since the best one

Diagnosis = tuple[str, str]


Rule = Callable[[StageHistory], Diagnosis | None]
Count = Callable[[StageHistory], str]  # the n of a rule's evidence


@dataclass(frozen=True)
class Finding:
    """What rule `name` found in `stage` at optimizer step `step`. `evidence` and `advice` are phrases without a final
    period; `advice` is an imperative."""

    name: str
    stage: str
    step: int
    evidence: str
    advice: str

    @property
    def text(self) -> str:
        return f"{self.evidence}. Try this: {self.advice}."

    def __str__(self) -> str:
        return f"{self.name} (stage {self.stage}, step {self.step}): {self.text}"


class _Entry(NamedTuple):
    rule: Rule
    n: Count
    needs_answers: bool  # False: it holds for any number of held-out answers


_RULES: dict[str, _Entry] = {}


def _rule(n: Count, needs_answers: bool = True) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES[function.__name__] = _Entry(function, n, needs_answers)
        return function

    return register


def _answers(names: Callable[[StageHistory], list[str]]) -> Count:
    return lambda history: f"{', '.join(f'{history.answers.get(name, 0)} {name}' for name in names(history))} answers"


_CHOSEN = _answers(lambda history: ["chosen"])
_MARGIN = _answers(lambda history: ["chosen", *history.dataset_negatives()])
_NEGATIVES = _answers(StageHistory.negatives)
_ALL = _answers(lambda history: ["chosen", *history.negatives()])


def _steps(history: StageHistory) -> str:
    return f"{history.recent_steps()} training steps"


def diagnose(
    stage: str, log_history: History, settings: Mapping[str, Any], answers: Mapping[str, int]
) -> list[Finding]:
    """The findings at the last probe of a log history. Before the first probe there are none.

    `answers`: the number of held-out answers by set (`Probes.answer_counts`).
    """
    return _examine(StageHistory.of(stage, log_history, settings, answers))


def new_findings(
    stage: str, log_history: History, settings: Mapping[str, Any], answers: Mapping[str, int]
) -> list[Finding]:
    """The findings at the last probe that no earlier probe had.

    They depend on the log history and the held-out answers only, so a resumed run reports the same ones.
    """
    history = StageHistory.of(stage, log_history, settings, answers)
    known = {finding.name for count in range(1, len(history.probes)) for finding in _examine(history.until(count))}
    return [finding for finding in _examine(history) if finding.name not in known]


def _examine(history: StageHistory) -> list[Finding]:
    if not history.probes:
        return []
    step = history.probes[-1]["step"]
    findings = []
    for name in finding_names(history.stage):
        entry = _RULES[name]
        diagnosis = entry.rule(history) if history.has_enough("chosen") or not entry.needs_answers else None
        if diagnosis is not None:
            evidence, advice = diagnosis
            findings.append(Finding(name, history.stage, step, f"{evidence} (n = {entry.n(history)})", advice))
    return findings


def needs_answers(name: str) -> bool:
    """Whether the finding `name` is about held-out answers, so that it takes `MIN_ANSWERS` of them."""
    return _RULES[name].needs_answers


def too_few(answers: Mapping[str, int]) -> str | None:
    """What the doctor says instead of findings on sets with fewer than `MIN_ANSWERS` answers; None if none has."""
    few = {name: count for name, count in answers.items() if count < MIN_ANSWERS}
    if "chosen" in few:
        return f"n = {few['chosen']} answers are too few for a diagnosis ({MIN_ANSWERS} needed)"
    if few:
        sets = ", ".join(f"n = {count} {name}" for name, count in few.items())
        return f"{sets} answers are too few for a diagnosis ({MIN_ANSWERS} needed), so these sets are left out"
    return None


@_rule(_CHOSEN, needs_answers=False)
def not_finite(history: StageHistory) -> Diagnosis | None:
    """NaN compares false with everything, so without this rule a diverged run would look healthy."""
    broken = [key for key in ("chosen_logp", "chosen_entropy", "chosen_tv") if not math.isfinite(history.last(key))]
    if not broken:
        return None
    return (
        f"{', '.join(broken)} on held-out answers: NaN or infinite",
        "lower the learning rate or max_grad_norm",
    )


@_rule(_MARGIN)
def squeezing(history: StageHistory) -> Diagnosis | None:
    """Pushing down an answer that is already unlikely takes probability from all other answers, the chosen one
    included, and gives it to the most likely token (Ren and Sutherland, arXiv 2407.10490). The margin, which is what
    training optimises, still rises."""
    fall, margin, top1 = -history.last("chosen_delta_mean_logp"), history.margin(), history.change("chosen_top1_prob")
    if not (fall >= FALL and margin >= MARGIN_RISE and top1 >= TOP1_RISE):
        return None
    return (
        f"the log-prob of chosen answers fell by {-history.last('chosen_delta_logp'):.2f} nats per answer "
        f"({fall:.3f} per token), while the margin rose by {margin:.2f} nats and the top-1 probability by {top1:.3f}: "
        "chosen and rejected answers both lose probability to the most likely tokens",
        f"{_cool_more(history)}, raise onpolicy_fraction, or lower the learning rate",
    )


@_rule(_MARGIN)
def margin_from_rejected(history: StageHistory) -> Diagnosis | None:
    """A margin that comes from the rejected answers alone teaches nothing about good answers. Chosen answers that keep
    their log-prob are fine: that is what cooling is for."""
    change, margin = history.last("chosen_delta_logp"), history.margin()
    if squeezing(history) or not (change <= -SLIP and margin >= MARGIN_RISE):
        return None
    return (
        f"the margin rose by {margin:.2f} nats only because rejected answers became less likely; "
        f"chosen answers lost {-change:.2f} nats per answer",
        f"{_cool_more(history)}, or stop earlier, because squeezing often follows",
    )


@_rule(_CHOSEN)
def overconfidence(history: StageHistory) -> Diagnosis | None:
    """The probability of the most likely token grows faster than how often that token is right."""
    rise, start, now = (get("chosen_ece") for get in (history.change, history.first, history.last))
    top1, accuracy = history.last("chosen_top1_prob"), history.last("chosen_accuracy")
    if not (rise >= ECE_RISE and top1 > accuracy):
        return None
    cooling = f", or {_cool_more(history)}" if history.stage == "dpo" else ""
    return (
        f"the calibration error (ECE) on chosen answers rose from {start:.3f} to {now:.3f}: the most likely token has "
        f"a mean probability of {top1:.3f} but is right for {accuracy:.1%} of the tokens",
        f"stop earlier, or lower the learning rate{cooling}",
    )


@_rule(_CHOSEN)
def drift(history: StageHistory) -> Diagnosis | None:
    """Far from its reference, a model has changed in more than the preference. In stage 1 that is the purpose."""
    tv, js = history.last("chosen_tv"), history.last("chosen_js")
    if not (tv >= TV_HIGH or js >= JS_HIGH):
        return None
    return (
        f"next-token distributions on chosen answers are far from the reference's: TV {tv:.2f}, JS {js:.2f} nats",
        "raise beta, lower the learning rate, or stop earlier",
    )


@_rule(_NEGATIVES)
def all_cooled(history: StageHistory) -> Diagnosis | None:
    """With all weights near 0, negatives have no effect: the loss only raises the chosen answers."""
    weights = history.cooling_weights()
    if not (weights and max(weights.values()) < COOLED):
        return None
    return (
        f"the mean cooling weight w_c is {_listed(weights)}: negatives have almost no effect on the loss",
        "lower logp_floor, raise tau, or use harder negatives (onpolicy_fraction)",
    )


@_rule(_NEGATIVES)
def no_cooling(history: StageHistory) -> Diagnosis | None:
    """With all weights near 1 the loss is that of DPO, even for easy negatives."""
    weights = history.cooling_weights()
    if not (weights and min(weights.values()) > UNCOOLED):
        return None
    return (
        f"the mean cooling weight w_c is {_listed(weights)}: the loss is almost that of DPO without cooling",
        "raise logp_floor or lower tau",
    )


@_rule(_ALL)
def easy_negatives_pushed(history: StageHistory) -> Diagnosis | None:
    """Cooling should keep training from pushing down negatives that are far less likely than the chosen answers."""
    weights = history.cooling_weights()
    gaps = {name: history.last("chosen_mean_logp") - history.last(f"{name}_mean_logp") for name in weights}
    pushed = [name for name, weight in weights.items() if gaps[name] > EASY_GAP and weight > EASY_PUSH]
    if not pushed or no_cooling(history):
        return None
    level = max(history.last(f"{name}_mean_logp") for name in pushed)
    each = [f"{name} ({gaps[name]:.2f} nats per token lower, mean w_c {weights[name]:.2f})" for name in pushed]
    return (
        f"negatives that are far less likely than the chosen answers are still pushed down: {', '.join(each)}",
        f"raise logp_floor above {level:.1f} nats per token",
    )


@_rule(_CHOSEN)
def entropy_collapse(history: StageHistory) -> Diagnosis | None:
    """The model became certain without being right. Entropy falls with learning too, but then chosen answers gain."""
    start, now = history.first("chosen_entropy"), history.last("chosen_entropy")
    gain = history.change("chosen_mean_logp")
    if not (start >= ENTROPY_SOME and now <= ENTROPY_LEFT * start and gain <= 0):
        return None
    return (
        f"the entropy on chosen answers fell from {start:.3f} to {now:.3f} nats per token, but their log-prob did not "
        f"rise ({gain:+.3f} nats per token)",
        "lower the learning rate, raise beta, or add harder negatives",
    )


@_rule(_steps, needs_answers=False)
def onpolicy_empty(history: StageHistory) -> Diagnosis | None:
    """Samples that equal a right answer or hold special tokens cannot be negatives (`wrong_answers`). If nearly all of
    them do, training falls back to the dataset's negatives. The logs do not say which of the two it is."""
    wanted, drawn = history.recent("onpolicy_fraction"), history.recent("onpolicy")
    if not (wanted > 0 and drawn < ONPOLICY_SHARE * wanted):
        return None
    return (
        f"only {drawn:.1%} of the pairs got an on-policy negative, but onpolicy_fraction asks for {wanted:.0%}: almost "
        "all samples equal a right answer or contain special tokens (such as image placeholders)",
        "look at some samples; if they are right, raise sampling.temperature or sampling.samples",
    )


@_rule(_steps, needs_answers=False)
def nothing_kept(history: StageHistory) -> Diagnosis | None:
    """Pairs whose negative has a mean log-prob below drop_below leave the loss. Without pairs there is no gradient."""
    kept = history.recent("kept")
    if not (history.has_cooling() and kept <= KEPT_FEW):
        return None
    return (
        f"drop_below = {history.settings.get('drop_below')} leaves {kept:.1%} of the pairs in the loss",
        "lower drop_below, or use harder negatives",
    )


@_rule(_CHOSEN)
def past_best(history: StageHistory) -> Diagnosis | None:
    """A hint for early stopping: chosen answers were best some probes ago and have become less likely since."""
    values = [probe["chosen_mean_logp"] for probe in history.probes]
    best = max(range(len(values)), key=values.__getitem__)
    loss = values[best] - values[-1]
    # If the first probe was the best, the stage never helped. Other rules, such as squeezing, report that.
    if not (0 < best <= len(values) - 1 - PAST_BEST and loss >= FALL):
        return None
    return (
        f"chosen answers were most likely at step {history.probes[best]['step']} ({values[best]:.3f} nats per token) "
        f"and have lost {loss:.3f} nats per token since",
        "keep the best weights with load_best_model_at_end, early_stopping_patience and "
        "metric_for_best_model: chosen_mean_logp",
    )


def _cool_more(history: StageHistory) -> str:
    if not history.has_cooling():
        return f"set loss: {CoolingWeighted.name}"
    return "raise logp_floor" if history.is_adaptive() else "set cooling: adaptive"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.2f} ({name})" for name, value in values.items())


class Doctor(TrainerCallback):
    """Prints each finding when a probe first shows it. A finding that `args.stop_on` names ends the stage.

    `answer_counts`: gives the number of held-out answers by set once they are drawn (`Probes.answer_counts`).
    """

    def __init__(self, answer_counts: Callable[[], Mapping[str, int]]) -> None:
        self.answer_counts = answer_counts

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        case = args.stage, state.log_history, vars(args), self.answer_counts()
        few = too_few(self.answer_counts())
        if few is not None and len(probe_entries(state.log_history)) == 1:
            say(f"{args.stage}: {few}")
        stops = [finding.name for finding in diagnose(*case) if finding.name in args.stop_on]
        for finding in new_findings(*case):
            say(f"found {finding}")
        if stops and not control.should_training_stop:
            say(f"stage {args.stage} stops at step {state.global_step}, because stop_on names {', '.join(stops)}")
        if stops:
            control.should_training_stop = True
