"""The doctor's rules: each on histories where it must and must not fire, and all on two real runs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from cwdpo_trainer.config.findings import finding_names
from cwdpo_trainer.evaluation.doctor import Doctor, diagnose, new_findings, too_few
from cwdpo_trainer.evaluation.history import MIN_ANSWERS

# A healthy stage 2: near negatives become less likely, easy ones are cooled, chosen answers do not change.
START = {
    "chosen_logp": -1.4, "chosen_delta_logp": 0.0, "chosen_mean_logp": -0.20, "chosen_delta_mean_logp": 0.0,
    "chosen_entropy": 0.17, "chosen_top1_prob": 0.915, "chosen_accuracy": 0.9, "chosen_ece": 0.015,
    "chosen_tv": 0.0, "chosen_js": 0.0,
    "near_delta_logp": 0.0, "near_mean_logp": -1.9, "near_cooling": 0.55,
    "easy_delta_logp": 0.0, "easy_mean_logp": -8.9, "easy_cooling": 0.0,
    "onpolicy_delta_logp": 0.0, "onpolicy_mean_logp": -1.0, "onpolicy_cooling": 0.8,
}  # fmt: skip
END = START | {
    "chosen_logp": -1.39, "chosen_delta_logp": 0.01, "chosen_mean_logp": -0.199, "chosen_delta_mean_logp": 0.001,
    "chosen_tv": 0.02, "chosen_js": 0.002, "near_delta_logp": -1.0, "near_mean_logp": -2.1, "near_cooling": 0.45,
    "easy_delta_logp": -0.5,
}  # fmt: skip
LOG = {"loss": 0.6, "kept": 1.0, "onpolicy": 0.2, "onpolicy_fraction": 0.5, "margin": 0.2}
SETTINGS = {"cooling": "adaptive", "drop_below": None}
ANSWERS = {"chosen": 40, "near": 25, "easy": 20, "onpolicy": 30}
SQUEEZED = {
    "chosen_delta_logp": -0.6, "chosen_delta_mean_logp": -0.06, "chosen_mean_logp": -0.26, "chosen_top1_prob": 0.93,
}  # fmt: skip


def history(*probes, logs=(LOG,) * 5):
    """A log history as in trainer_state.json: probes at steps 0, 20, ..., training logs at steps 5, 10, ..."""
    entries = [{"step": 20 * index, **{f"eval_{k}": v for k, v in probe.items()}} for index, probe in enumerate(probes)]
    return [*entries, *({"step": 5 * (index + 1), **log} for index, log in enumerate(logs))]


def found(stage, *probes, logs=(LOG,) * 5, **settings):
    return {finding.name for finding in diagnose(stage, history(*probes, logs=logs), SETTINGS | settings, ANSWERS)}


def means(*values):
    return [START | {"chosen_mean_logp": value} for value in values]


COOL = {"near_cooling": 0.04, "easy_cooling": 0.0, "onpolicy_cooling": 0.049}
HOT = {"near_cooling": 0.97, "easy_cooling": 0.96, "onpolicy_cooling": 0.99}
OVERCONFIDENT = {"chosen_ece": 0.05, "chosen_top1_prob": 0.918, "chosen_accuracy": 0.87}
COLLAPSED = {"chosen_entropy": 0.05, "chosen_mean_logp": -0.21}


@pytest.mark.parametrize(
    ("expected", "last", "logs", "settings"),
    [
        (None, {}, {}, {}),
        ("squeezing", SQUEEZED, {}, {}),
        # The margin does not rise: chosen answers and negatives lose the same.
        (None, SQUEEZED | {"near_delta_logp": -0.6, "easy_delta_logp": -0.6}, {}, {}),
        # The margin rises, but the top-1 probability does not: the milder finding.
        ("margin_from_rejected", SQUEEZED | {"chosen_top1_prob": 0.915}, {}, {}),
        ("margin_from_rejected", {"chosen_delta_logp": -0.2, "chosen_delta_mean_logp": -0.01}, {}, {}),
        (None, {"chosen_delta_logp": -0.05, "chosen_delta_mean_logp": -0.005}, {}, {}),
        ("overconfidence", OVERCONFIDENT, {}, {}),
        (None, OVERCONFIDENT | {"chosen_ece": 0.03}, {}, {}),
        (None, OVERCONFIDENT | {"chosen_accuracy": 0.96}, {}, {}),  # underconfident
        ("drift", {"chosen_tv": 0.31}, {}, {}),
        ("drift", {"chosen_js": 0.21}, {}, {}),
        (None, {"chosen_tv": 0.29, "chosen_js": 0.19}, {}, {}),
        ("all_cooled", COOL, {}, {}),
        (None, COOL | {"onpolicy_cooling": 0.06}, {}, {}),
        (None, COOL, {}, {"cooling": "constant"}),
        ("no_cooling", HOT, {}, {}),
        (None, HOT, {}, {"cooling": "off"}),  # the user's choice
        ("easy_negatives_pushed", {"easy_cooling": 0.6}, {}, {}),
        (None, {"easy_cooling": 0.4}, {}, {}),
        (None, {"easy_cooling": 0.6, "easy_mean_logp": -2.1}, {}, {}),
        ("entropy_collapse", COLLAPSED, {}, {}),
        (None, COLLAPSED | {"chosen_mean_logp": -0.19}, {}, {}),  # chosen answers gained
        (None, COLLAPSED | {"chosen_entropy": 0.1}, {}, {}),
        ("onpolicy_empty", {}, {"onpolicy": 0.01}, {}),
        (None, {}, {"onpolicy": 0.06}, {}),
        (None, {}, {"onpolicy": 0.0, "onpolicy_fraction": 0.0}, {}),
        ("nothing_kept", {}, {"kept": 0.0}, {"drop_below": -1.0}),
        (None, {}, {"kept": 0.1}, {"drop_below": -1.0}),
        ("not_finite", {"chosen_logp": math.nan, "chosen_mean_logp": math.nan}, {}, {}),
    ],
)
def test_rules_of_stage_two(expected, last, logs, settings):
    names = found("dpo", START, END | last, logs=[LOG | logs] * 5, **settings)
    assert names == ({expected} if expected else set())


@pytest.mark.parametrize(
    ("expected", "probes"),
    [
        (set(), means(-4.0, -1.0, -0.4, -0.3)),
        ({"past_best"}, means(-4.0, -0.30, -0.31, -0.33)),
        (set(), means(-4.0, -1.0, -0.30, -0.33)),  # only one probe after the best
        (set(), means(-4.0, -0.30, -0.305, -0.31)),
        (set(), means(-0.30, -0.31, -0.32, -0.33)),
        ({"overconfidence"}, [START, START | OVERCONFIDENT]),
        ({"entropy_collapse"}, [START, START | COLLAPSED]),
        ({"not_finite"}, [START, START | {"chosen_entropy": math.inf}]),
        # Problems of stage 2 only: SFT is meant to change the model, and does not use cooling weights.
        (set(), [START, END | {"chosen_tv": 0.9, "chosen_js": 0.6} | COOL]),
    ],
)
def test_rules_of_stage_one(expected, probes):
    assert found("sft", *probes) == expected


def test_the_tables_above_cover_every_rule():
    stage_two = {"squeezing", "margin_from_rejected", "drift", "all_cooled", "no_cooling", "easy_negatives_pushed",
                 "onpolicy_empty", "nothing_kept"}  # fmt: skip
    both = {"not_finite", "overconfidence", "entropy_collapse", "past_best"}
    assert set(finding_names("sft")) == both
    assert set(finding_names("dpo")) == stage_two | both


def test_findings_give_evidence_and_advice():
    (finding,) = diagnose("dpo", history(START, END | SQUEEZED), SETTINGS, ANSWERS)
    words = str(finding)
    assert words.startswith(
        "squeezing (stage dpo, step 20): the log-prob of chosen answers fell by 0.60 nats per answer (0.060 per token)"
    )
    assert "margin rose by 0.15 nats and the top-1 probability by 0.015" in words
    assert words.endswith(
        " (n = 40 chosen, 25 near, 20 easy answers). "
        "Try this: raise logp_floor, raise onpolicy_fraction, or lower the learning rate."
    )
    (control,) = diagnose("dpo", history(START, END | SQUEEZED), SETTINGS | {"cooling": "off"}, ANSWERS)
    assert "cooling: adaptive" in control.advice


def test_no_findings_before_the_first_probe():
    assert diagnose("dpo", history(), SETTINGS, ANSWERS) == []
    assert new_findings("dpo", history(), SETTINGS, ANSWERS) == []


def test_only_recent_logs_count():
    old, new = LOG | {"kept": 1.0}, LOG | {"kept": 0.0}
    assert found("dpo", START, END, logs=[old] * 20 + [new] * 5) == {"nothing_kept"}
    assert found("dpo", START, END, logs=[new] * 20 + [old] * 5) == set()


def test_a_finding_is_new_once():
    bad = END | {"chosen_tv": 0.4}
    for probes, expected in (
        ([START, bad], ["drift"]),
        ([START, bad, bad], []),
        ([START, bad, END, bad], []),
        ([START, bad, bad | SQUEEZED], ["squeezing"]),
    ):
        assert [finding.name for finding in new_findings("dpo", history(*probes), SETTINGS, ANSWERS)] == expected


def test_earlier_probes_are_judged_by_the_logs_before_them():
    """From step 25 on, all pairs are dropped. The probe at step 60 is the first to show it."""
    logs = [LOG] * 4 + [LOG | {"kept": 0.0}] * 12  # at steps 5 to 80; probes at 0, 20, 40, ...
    for probes, expected in ((2, []), (3, []), (4, ["nothing_kept"]), (5, [])):
        past = history(START, *[END] * (probes - 1), logs=logs[: 4 * (probes - 1)])
        assert [finding.name for finding in new_findings("dpo", past, SETTINGS, ANSWERS)] == expected


@pytest.mark.parametrize(("stop_on", "stops"), [([], False), (["drift"], True), (["squeezing"], False)])
def test_a_finding_in_stop_on_ends_the_stage(stop_on, stops, capsys):
    args = SimpleNamespace(stage="dpo", stop_on=stop_on, **SETTINGS)
    state = SimpleNamespace(
        log_history=history(START, END | {"chosen_tv": 0.4}), global_step=20, is_world_process_zero=True
    )
    control = SimpleNamespace(should_training_stop=False)
    Doctor(lambda: ANSWERS).on_evaluate(args, state, control)
    assert control.should_training_stop is stops
    printed = capsys.readouterr().out
    assert "found drift (stage dpo, step 20): " in printed
    assert ("stage dpo stops at step 20, because stop_on names drift" in printed) is stops


# Probes of stage 2 of the digits recipe, from the same SFT model: with `cooling: off` (DPO), and unchanged (CW-DPO).
KEYS = ("chosen_delta_logp", "chosen_delta_mean_logp", "chosen_mean_logp", "near_delta_logp", "easy_delta_logp",
        "chosen_entropy", "chosen_top1_prob", "chosen_accuracy", "chosen_ece")  # fmt: skip
DIGITS_START = (0.0, 0.0, -0.194, 0.0, 0.0, 0.170, 0.918, 0.898, 0.020)
DIGITS_DPO = (
    (-0.025, -0.003, -0.197, -1.322, -9.096, 0.180, 0.915, 0.900, 0.018),
    (-0.171, -0.017, -0.211, -3.496, -16.448, 0.167, 0.929, 0.895, 0.036),
    (-0.242, -0.027, -0.221, -4.330, -18.752, 0.143, 0.944, 0.898, 0.046),
)
DIGITS_CWDPO = (
    (-0.049, -0.008, -0.202, -1.561, -0.045, 0.180, 0.912, 0.896, 0.017),
    (0.047, -0.002, -0.196, -2.728, -2.079, 0.168, 0.914, 0.900, 0.015),
    (0.035, -0.001, -0.194, -3.531, -3.321, 0.167, 0.911, 0.905, 0.007),
)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        (DIGITS_DPO, {"cooling": "off"}, [set(), {"margin_from_rejected"}, {"squeezing"}]),
        (DIGITS_CWDPO, {}, [set(), set(), set()]),
    ],
    ids=["dpo", "cwdpo"],
)
def test_real_runs(rows, settings, expected):
    probes = [START | dict(zip(KEYS, values, strict=True)) for values in (DIGITS_START, *rows)]
    assert [found("dpo", *probes[: end + 1], **settings) for end in range(1, 4)] == expected


def test_missing_onpolicy_negatives_have_two_possible_reasons():
    """The logs do not say whether samples were right or had special tokens."""
    (finding,) = diagnose("dpo", history(START, END, logs=[LOG | {"onpolicy": 0.01}] * 5), SETTINGS, ANSWERS)
    assert "almost all samples equal a right answer or contain special tokens" in str(finding)


BAD = {
    "squeezing": SQUEEZED, "margin_from_rejected": SQUEEZED | {"chosen_top1_prob": 0.915},
    "overconfidence": OVERCONFIDENT, "drift": {"chosen_tv": 0.31}, "all_cooled": COOL, "no_cooling": HOT,
    "easy_negatives_pushed": {"easy_cooling": 0.6}, "entropy_collapse": COLLAPSED,
}  # fmt: skip
COUNTED = {
    "squeezing": "40 chosen, 25 near, 20 easy answers", "margin_from_rejected": "40 chosen, 25 near, 20 easy answers",
    "overconfidence": "40 chosen answers", "drift": "40 chosen answers", "entropy_collapse": "40 chosen answers",
    "all_cooled": "25 near, 20 easy, 30 onpolicy answers", "no_cooling": "25 near, 20 easy, 30 onpolicy answers",
    "easy_negatives_pushed": "40 chosen, 25 near, 20 easy, 30 onpolicy answers",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_findings_say_n_and_need_enough_answers(name):
    case = "dpo", history(START, END | BAD[name]), SETTINGS
    (finding,) = diagnose(*case, ANSWERS)
    assert finding.name == name
    assert finding.evidence.endswith(f" (n = {COUNTED[name]})")
    for chosen in (MIN_ANSWERS - 1, 0):
        assert diagnose(*case, ANSWERS | {"chosen": chosen}) == new_findings(*case, ANSWERS | {"chosen": chosen}) == []
    (finding,) = diagnose(*case, dict.fromkeys(ANSWERS, MIN_ANSWERS))
    assert f"n = {MIN_ANSWERS} " in finding.text


def test_past_best_says_n_and_needs_enough_answers():
    case = "sft", history(*means(-4.0, -0.30, -0.31, -0.33)), SETTINGS
    assert [finding.evidence.endswith(" (n = 40 chosen answers)") for finding in diagnose(*case, ANSWERS)] == [True]
    assert diagnose(*case, {"chosen": 19, "near": 40}) == []


def test_a_set_with_few_answers_is_left_out():
    """The few easy answers can neither make a finding nor prevent one."""
    few = ANSWERS | {"easy": 19}
    pushed, cooled = (history(START, END | last) for last in ({"easy_cooling": 0.6}, COOL | {"easy_cooling": 0.9}))
    assert diagnose("dpo", pushed, SETTINGS, few) == []
    (finding,) = diagnose("dpo", cooled, SETTINGS, few)
    assert finding.name == "all_cooled"
    assert finding.evidence.endswith(" (n = 25 near, 30 onpolicy answers)")
    # Without the easy answers, which fell by 0.5, the margin is that of the near ones.
    (finding,) = diagnose("dpo", history(START, END | SQUEEZED), SETTINGS, few)
    assert "the margin rose by 0.40 nats" in finding.evidence


@pytest.mark.parametrize(
    ("name", "last", "logs", "n"),
    [
        ("nothing_kept", {}, {"kept": 0.0}, "25 training steps"),
        ("onpolicy_empty", {}, {"onpolicy": 0.01}, "25 training steps"),
        ("not_finite", {"chosen_logp": math.nan, "chosen_mean_logp": math.nan}, {}, "6 chosen answers"),
    ],
)
def test_training_logs_and_nan_need_no_held_out_answers(name, last, logs, n):
    """They come from training pairs, and one NaN is enough."""
    case = "dpo", history(START, END | last, logs=[LOG | logs] * 7), SETTINGS
    (finding,) = diagnose(*case, {"chosen": 6, "near": 3, "easy": 3})
    assert finding.name == name
    assert finding.evidence.endswith(f" (n = {n})")


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ({"chosen": 6, "near": 3}, "n = 6 answers are too few for a diagnosis (20 needed)"),
        ({"chosen": 19, "near": 40}, "n = 19 answers are too few for a diagnosis (20 needed)"),
        ({"chosen": 20, "near": 20}, None),
        (
            {"chosen": 20, "near": 12, "easy": 8},
            "n = 12 near, n = 8 easy answers are too few for a diagnosis (20 needed), so these sets are left out",
        ),
    ],
)
def test_too_few_answers_are_one_line(answers, line, capsys):
    assert too_few(answers) == line
    args = SimpleNamespace(stage="dpo", stop_on=["drift"], **SETTINGS)
    for probes in ([START], [START, END | {"chosen_tv": 0.4}], [START, END, END | {"chosen_tv": 0.4}]):
        state = SimpleNamespace(log_history=history(*probes), global_step=20, is_world_process_zero=True)
        control = SimpleNamespace(should_training_stop=False)
        Doctor(lambda: answers).on_evaluate(args, state, control)
    assert control.should_training_stop is (answers["chosen"] >= MIN_ANSWERS)
    printed = capsys.readouterr().out
    assert printed.count("too few") == (line is not None)
    assert line is None or f"dpo: {line}\n" in printed
    assert ("found" in printed) == (answers["chosen"] >= MIN_ANSWERS)
