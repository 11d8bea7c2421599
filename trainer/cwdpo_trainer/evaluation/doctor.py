"""The doctor: reads what a stage has shown so far and says in plain words what is wrong, on what evidence, what helps.

Each rule is a function of a `Course` that returns (evidence, advice), or None where all is well. A figure that is
missing or NaN makes every comparison false, so a rule without its evidence says nothing; a run whose figures are
not finite has a rule of its own. A finding is a reason to look, not a proof: thresholds are below, with their reasons.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from cwdpo_trainer.config.findings import finding_names
from cwdpo_trainer.evaluation.history import History, probe_entries, sets_of, training_entries

# Log-probs of answers move by some hundredths of a nat per token in a healthy stage 2 (0.01 in the digits task).
FALL = 0.02  # nats per token, of chosen answers
SLIP = 0.1  # nats per answer, of chosen answers: a tenth of their probability
MARGIN_RISE = 0.1  # nats per answer: between chosen and rejected, held out
TOP1_RISE = 0.005  # probability
# Of calibration error the paper reports 0.08 to 0.10 for CW-DPO and 0.25 for DPO; it starts near 0.01 here.
ECE_RISE = 0.03
# Of TV and JS against the reference the paper reports 0.15 and 0.10 for CW-DPO, 0.45 and 0.30 for DPO: half-way.
TV_HIGH = 0.3
JS_HIGH = 0.2  # nats, of at most ln 2
COOLED = 0.05  # mean w_c: a push 20 times weaker than DPO's
UNCOOLED = 0.95
EASY_GAP = 2.0  # nats per token below the chosen answers: each token e^2 = 7 times less likely
EASY_PUSH = 0.5  # w_c
ENTROPY_LEFT = 0.5  # share of the entropy at the start
ENTROPY_SOME = 0.02  # nats; less at the start is nothing to lose
ONPOLICY_SHARE = 0.1  # of the on-policy negatives that were asked for
KEPT_FEW = 0.05  # share of the pairs
PAST_BEST = 2  # probes
RECENT = 5  # training logs that are averaged into one figure

Diagnosis = tuple[str, str]


@dataclass(frozen=True)
class Course:
    """What a stage (`sft` or `dpo`) has shown: its probes and training logs in the order of steps, and its settings
    by name. Where only two models are compared, the probes are the reference's and the model's, and there are no logs.
    """

    stage: str
    probes: History
    logs: History
    settings: Mapping[str, Any]

    def until(self, count: int) -> Course:
        """The course as it was at its probe number `count`."""
        logs = bisect_right(self.logs, self.probes[count - 1]["step"], key=lambda entry: entry["step"])
        return replace(self, probes=self.probes[:count], logs=self.logs[:logs])

    def first(self, key: str) -> float:
        return self.probes[0].get(key, math.nan)

    def last(self, key: str) -> float:
        return self.probes[-1].get(key, math.nan)

    def change(self, key: str) -> float:
        return self.last(key) - self.first(key)

    def recent(self, key: str) -> float:
        """The mean of the last `RECENT` training logs that have `key`; NaN if none has."""
        values = list(islice((entry[key] for entry in reversed(self.logs) if key in entry), RECENT))
        return sum(values) / len(values) if values else math.nan

    def negatives(self) -> list[str]:
        """The sets of negatives that the last probe measured; those of the data set come first."""
        return [name for name in sets_of(self.probes[-1]) if name != "chosen"]

    def margin(self) -> float:
        """How much further the data set's negatives fell than the chosen answers, against the reference; nats."""
        falls = [self.last(f"{name}_delta_logp") for name in self.negatives() if name != "onpolicy"]
        return self.last("chosen_delta_logp") - sum(falls) / len(falls) if falls else math.nan

    def is_adaptive(self) -> bool:
        return self.settings.get("cooling", "adaptive") == "adaptive"

    def cooling(self) -> dict[str, float]:
        """Mean w_c by set of negatives; empty where the weight is a constant, which is no finding but a choice."""
        if not self.is_adaptive():
            return {}
        return {name: self.last(f"{name}_cooling") for name in self.negatives()}


Rule = Callable[[Course], Diagnosis | None]


@dataclass(frozen=True)
class Finding:
    """What the rule `name` found in `stage` at optimizer step `step`: in words."""

    name: str
    stage: str
    step: int
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name} (stage {self.stage}, step {self.step}): {self.evidence}; {self.advice}"


_RULES: dict[str, Rule] = {}


def _rule(function: Rule) -> Rule:
    _RULES[function.__name__] = function
    return function


def diagnose(stage: str, history: History, settings: Mapping[str, Any]) -> list[Finding]:
    """What holds at the last probe of a log history; nothing before the first probe."""
    return _examined(Course(stage, probe_entries(history), training_entries(history), settings))


def new_findings(stage: str, history: History, settings: Mapping[str, Any]) -> list[Finding]:
    """Those of `diagnose` that no earlier probe of the history had: nothing to remember, so a resumed run agrees."""
    course = Course(stage, probe_entries(history), training_entries(history), settings)
    known = {finding.name for count in range(1, len(course.probes)) for finding in _examined(course.until(count))}
    return [finding for finding in _examined(course) if finding.name not in known]


def _examined(course: Course) -> list[Finding]:
    if not course.probes:
        return []
    step = course.probes[-1]["step"]
    found = {name: _RULES[name](course) for name in finding_names(course.stage)}
    return [Finding(name, course.stage, step, *words) for name, words in found.items() if words is not None]


@_rule
def not_finite(course: Course) -> Diagnosis | None:
    """NaN compares false with everything: without this rule a run that died would look healthy."""
    broken = [key for key in ("chosen_logp", "chosen_entropy", "chosen_tv") if not math.isfinite(course.last(key))]
    if not broken:
        return None
    return f"{', '.join(broken)} of the held-out answers are not finite", "lower the learning rate or max_grad_norm"


@_rule
def squeezing(course: Course) -> Diagnosis | None:
    """Pushing down an answer that is unlikely already takes mass from all others, the chosen one included, and gives
    it to the most likely token (Ren and Sutherland, arXiv 2407.10490). The margin, which training sees, still rises.
    """
    fall, margin, top1 = -course.last("chosen_delta_mean_logp"), course.margin(), course.change("chosen_top1_prob")
    if not (fall >= FALL and margin >= MARGIN_RISE and top1 >= TOP1_RISE):
        return None
    return (
        f"chosen log-prob fell {-course.last('chosen_delta_logp'):.2f} nats ({fall:.3f} per token) while the margin "
        f"rose {margin:.2f} nats and the top-1 probability {top1:.3f}: mass leaves both answers",
        f"{_more_cooling(course)}, raise onpolicy_fraction, or lower the learning rate",
    )


@_rule
def margin_from_rejected(course: Course) -> Diagnosis | None:
    """A margin that comes from the rejected side alone has taught nothing about good answers, and squeezing follows.
    Chosen answers that keep their log-prob are fine: that is what cooling is for."""
    change, margin = course.last("chosen_delta_logp"), course.margin()
    if squeezing(course) or not (change <= -SLIP and margin >= MARGIN_RISE):
        return None
    return (
        f"the margin rose {margin:.2f} nats through rejected answers alone; chosen ones lost {-change:.2f} nats",
        f"{_more_cooling(course)}, or stop earlier: squeezing comes next",
    )


@_rule
def overconfidence(course: Course) -> Diagnosis | None:
    """The top token's probability outgrows how often it is right: the model no longer knows what it does not know."""
    rise, start, now = (get("chosen_ece") for get in (course.change, course.first, course.last))
    top1, right = course.last("chosen_top1_prob"), course.last("chosen_accuracy")
    if not (rise >= ECE_RISE and top1 > right):
        return None
    cooling = f", or {_more_cooling(course)}" if course.stage == "dpo" else ""
    return (
        f"calibration error rose from {start:.3f} to {now:.3f}: the top token's probability is {top1:.3f}, and it is "
        f"right in {right:.3f}",
        f"stop earlier or lower the learning rate{cooling}",
    )


@_rule
def drift(course: Course) -> Diagnosis | None:
    """Far from its reference a model has changed in more than the preference. In stage 1 that is the purpose."""
    tv, js = course.last("chosen_tv"), course.last("chosen_js")
    if not (tv >= TV_HIGH or js >= JS_HIGH):
        return None
    return (
        f"next-token distributions are TV {tv:.2f}, JS {js:.2f} nats away from the reference's on chosen answers",
        "raise beta, lower the learning rate, or stop earlier",
    )


@_rule
def all_cooled(course: Course) -> Diagnosis | None:
    """With every weight near 0 rejected answers do not push: what is left is to raise the chosen ones."""
    weights = course.cooling()
    if not (weights and max(weights.values()) < COOLED):
        return None
    return (
        f"mean w_c is {_listed(weights)}: no negative pushes",
        "lower logp_floor, raise tau, or bring harder negatives (onpolicy_fraction)",
    )


@_rule
def no_cooling(course: Course) -> Diagnosis | None:
    """With every weight near 1 the loss is that of DPO, easy negatives included."""
    weights = course.cooling()
    if not (weights and min(weights.values()) > UNCOOLED):
        return None
    return f"mean w_c is {_listed(weights)}: this is DPO without cooling", "raise logp_floor or lower tau"


@_rule
def easy_negatives_pushed(course: Course) -> Diagnosis | None:
    """What cooling is to prevent: a negative far below the chosen answers that is pushed further down."""
    gaps = {name: course.last("chosen_mean_logp") - course.last(f"{name}_mean_logp") for name in course.cooling()}
    pushed = {name: weight for name, weight in course.cooling().items() if gaps[name] > EASY_GAP and weight > EASY_PUSH}
    if not pushed or no_cooling(course):
        return None
    level = max(course.last(f"{name}_mean_logp") for name in pushed)
    return (
        f"mean w_c is {_listed(pushed)} though these negatives are {_listed({name: gaps[name] for name in pushed})} "
        "nats per token below the chosen answers",
        f"raise logp_floor above {level:.1f}",
    )


@_rule
def entropy_collapse(course: Course) -> Diagnosis | None:
    """Certain without being right: entropy falls with learning too, but then the chosen answers gain."""
    start, now, gain = course.first("chosen_entropy"), course.last("chosen_entropy"), course.change("chosen_mean_logp")
    if not (start >= ENTROPY_SOME and now <= ENTROPY_LEFT * start and gain <= 0):
        return None
    return (
        f"entropy fell from {start:.3f} to {now:.3f} nats a token and chosen answers gained nothing ({gain:+.3f} nats)",
        "lower the learning rate, raise beta, or add harder negatives",
    )


@_rule
def onpolicy_empty(course: Course) -> Diagnosis | None:
    """Samples that equal a reference are no negatives. A model that is hardly ever wrong when it is sampled has none,
    and the run falls back on those of the data set."""
    wanted, drawn = course.recent("onpolicy_fraction"), course.recent("onpolicy")
    if not (wanted > 0 and drawn < ONPOLICY_SHARE * wanted):
        return None
    return (
        f"{drawn:.1%} of the pairs got a negative of the model's own, of {wanted:.0%} asked for: its samples are right",
        "raise sampling.temperature or sampling.samples",
    )


@_rule
def nothing_kept(course: Course) -> Diagnosis | None:
    """Pairs whose negative is below drop_below leave the loss; without pairs there is no gradient."""
    kept = course.recent("kept")
    if not kept <= KEPT_FEW:
        return None
    return (
        f"drop_below = {course.settings.get('drop_below')} leaves {kept:.1%} of the pairs in the loss",
        "lower drop_below, or bring harder negatives",
    )


@_rule
def past_best(course: Course) -> Diagnosis | None:
    """A hint for early stopping: chosen answers were best some probes ago and have lost ever since."""
    values = [probe["chosen_mean_logp"] for probe in course.probes]
    place = max(range(len(values)), key=values.__getitem__)
    loss = values[place] - values[-1]
    # A best at the very start is no peak: the stage never helped, which squeezing and its kin are about.
    if not (0 < place <= len(values) - 1 - PAST_BEST and loss >= FALL):
        return None
    return (
        f"chosen answers were best at step {course.probes[place]['step']} ({values[place]:.3f} nats per token) and "
        f"have lost {loss:.3f} since",
        "stop there: early_stopping_patience with metric_for_best_model: chosen_mean_logp, load_best_model_at_end",
    )


def _more_cooling(course: Course) -> str:
    return "raise logp_floor" if course.is_adaptive() else "let weights cool (cooling: adaptive)"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.2f} ({name})" for name, value in values.items())


class Doctor(TrainerCallback):
    """Prints what is found when a probe first shows it; a finding that `args.stop_on` names ends the stage."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        case = args.stage, state.log_history, vars(args)
        stops = [finding.name for finding in diagnose(*case) if finding.name in args.stop_on]
        if state.is_world_process_zero:
            for finding in new_findings(*case):
                tqdm.write(f"found {finding}")
            if stops and not control.should_training_stop:
                tqdm.write(f"the stage ends at step {state.global_step}, as stop_on says: {', '.join(stops)}")
        if stops:
            control.should_training_stop = True
