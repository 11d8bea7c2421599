"""On-policy negatives: which pairs get one, when answers are drawn again, and how they are generated."""

from __future__ import annotations

import copy
import dataclasses
import json
import random

import pytest
import torch
from accelerate import Accelerator

from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.config.stage_arguments import Schedule
from cwdpo_trainer.negatives.log import NegativesLog
from cwdpo_trainer.negatives.policy import PolicyInTraining, answers_logp
from cwdpo_trainer.negatives.pool import OnPolicyPool, uniform
from cwdpo_trainer.negatives.sampling import caption, ended, normalize, sample_answers, wrong_answers

ROWS = list(range(200))
DATASET = [[-1]] * len(ROWS)


class Drawing:
    """A fake policy. Its answers to a row depend on the seed; all of a row's answers have the same log-prob."""

    def __init__(self, logp=-1.0):
        self.logp = logp
        self.asked = []

    def draw(self, rows, seed):
        self.asked += [list(rows)] if rows else []
        return [[[row, seed % 97], [row, seed % 89]] for row in rows]

    def mean_logp(self, rows, answers):
        return [[self.logp - row * 1e-3 for _ in of_row] for row, of_row in zip(rows, answers, strict=True)]


def pool(refresh_steps=10, max_staleness=None, seed=1):
    return OnPolicyPool(refresh_steps, max_staleness, seed)


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_a_fraction_of_the_pairs_is_on_policy(fraction, low, high):
    policy = Drawing()
    negatives = pool().mix(ROWS, DATASET, 3, fraction, policy)
    assert low <= sum(negatives.is_onpolicy) <= high
    assert bool(policy.asked) == (fraction > 0)
    for row, tokens, is_onpolicy in zip(ROWS, *negatives[:2], strict=True):
        assert (tokens[0] == row) if is_onpolicy else (tokens == [-1])


def test_the_choice_depends_on_seed_step_and_row_only():
    first = pool().mix(ROWS, DATASET, 3, 0.5, Drawing())
    random.seed(99)
    torch.manual_seed(99)
    assert pool().mix(ROWS, DATASET, 3, 0.5, Drawing()) == first
    alone = pool().mix(ROWS[7:8], DATASET[:1], 3, 0.5, Drawing())
    assert alone.is_onpolicy == first.is_onpolicy[7:8]
    assert pool().mix(ROWS, DATASET, 4, 0.5, Drawing()) != first
    assert pool(seed=2).mix(ROWS, DATASET, 3, 0.5, Drawing()) != first


def test_uniform_is_the_same_in_every_process():
    assert uniform(0, 1, 2) == pytest.approx(0.1922018794572527)
    assert 0 <= min(uniform(index) for index in range(1000)) < 0.01


def test_answers_are_drawn_again_after_refresh_steps():
    drawn, policy = pool(refresh_steps=3), Drawing()
    drawn.mix([5], [[-1]], 0, 1.0, policy)
    drawn.mix([5], [[-1]], 2, 1.0, policy)
    drawn.mix([5, 6], [[-1]] * 2, 3, 1.0, policy)
    assert policy.asked == [[5], [5, 6]]
    assert drawn.drawn[5].step == 3


def test_answers_are_drawn_again_once_they_are_stale():
    drawn, policy = pool(refresh_steps=100, max_staleness=0.2), Drawing(logp=-1.0)
    assert drawn.mix([5, 6], [[-1]] * 2, 0, 1.0, policy).staleness == []
    policy.logp = -1.15
    assert drawn.mix([5, 6], [[-1]] * 2, 4, 1.0, policy).staleness == pytest.approx([0.15] * 2)
    assert policy.asked == [[5, 6]]
    policy.logp = -1.25
    assert drawn.mix([5], [[-1]], 5, 1.0, policy).staleness == pytest.approx([0.25])
    assert policy.asked == [[5, 6], [5]]
    # New answers are compared with the policy that drew them.
    policy.logp = -1.35
    assert drawn.mix([5, 6], [[-1]] * 2, 6, 1.0, policy).staleness == pytest.approx([0.1, 0.35])
    assert policy.asked == [[5, 6], [5], [6]]
    # Answers that became more likely are not stale.
    policy.logp = 0.0
    drawn.mix([5, 6], [[-1]] * 2, 7, 1.0, policy)
    assert len(policy.asked) == 3


def test_rows_without_a_wrong_sample_keep_their_negative():
    policy = Drawing()
    policy.draw = lambda rows, seed: [[], [[9]]]
    assert pool(max_staleness=0.1).mix([5, 6], [[1], [2]], 0, 1.0, policy)[:2] == ([[1], [9]], [False, True])


def test_a_saved_pool_continues_exactly(tmp_path):
    first = pool(4, 0.1, seed=3)
    first.mix(ROWS, DATASET, 2, 0.7, Drawing())
    first.save(tmp_path / "pool.json")
    resumed = pool(4, 0.1, seed=3)
    resumed.load(tmp_path / "pool.json")
    for step in range(3, 9):
        policy = Drawing(logp=-1 - 0.04 * step)
        assert resumed.mix(ROWS, DATASET, step, 0.7, policy) == first.mix(ROWS, DATASET, step, 0.7, policy)


@pytest.mark.parametrize(
    ("value", "steps", "values"),
    [
        (0.25, [0, 40, 80], [0.25] * 3),
        ([[0, 0.0], [0.5, 0.5]], [0, 20, 40, 80], [0.0, 0.25, 0.5, 0.5]),
        ([[10, 1.0], [20, 0.0], [60, 0.4]], [0, 10, 15, 20, 40, 80], [1.0, 1.0, 0.5, 0.0, 0.2, 0.4]),
    ],
)
def test_a_schedule_is_linear_between_its_points(value, steps, values):
    assert [Schedule.of(value).at(step, 80) for step in steps] == pytest.approx(values)


@pytest.mark.parametrize("value", [True, None, [], [[1]], [0.5], [[0.5, 1], [0.5, 2]], [[-1, 0]], "much"])
def test_invalid_schedules_are_refused(value):
    with pytest.raises(ValueError, match=r".+"):
        Schedule.of(value)


def test_the_log_of_negatives_continues_from_a_checkpoint(tmp_path):
    log = NegativesLog(tmp_path / "negatives.jsonl")
    log.start(0)
    for step in range(3):
        log.write(step, ["a:1", "a:2"], [False, True], ["from the dataset", f"wrong {step}"])
    content = log.path.read_bytes()
    with log.path.open("a") as file:
        file.write('{"step": 3, "ro')
    log.start(2)
    log.write(2, ["a:1", "a:2"], [False, True], ["from the dataset", "wrong 2"])
    assert log.path.read_bytes() == content
    assert json.loads(content.splitlines()[1]) == {"step": 0, "row": "a:2", "origin": "onpolicy", "answer": "wrong 0"}
    assert json.loads(content.splitlines()[2]) == {"step": 1, "row": "a:1", "origin": "dataset"}
    log.start(0)
    assert log.path.read_bytes() == b""


def test_answers_logp_agrees_with_full_logits(model, collator, rows):
    attach_head(model)
    answers = [[[7, 8, 2], [9, 2]], [], [[6, 6, 6, 2]]]
    found = answers_logp(model, collator, rows[:3], answers, forwards=2)
    for row, of_row, values in zip(rows, answers, found, strict=False):
        for tokens, value in zip(of_row, values, strict=True):
            ids = collator.prompts([row])
            length = ids["input_ids"].shape[1]
            ids["input_ids"] = torch.cat([ids["input_ids"], torch.tensor([tokens])], dim=1)
            logits = model(**{**ids, "attention_mask": torch.ones_like(ids["input_ids"])}).logits.double()
            logp = logits.log_softmax(-1)[0, length - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])
            assert value == pytest.approx(logp.mean().item(), abs=1e-5)


def test_ranks_without_work_run_a_dummy_row(model, collator, rows, monkeypatch):
    """Only if the model is sharded, because its forward is then collective."""
    attach_head(model)
    settings = SamplingArguments(max_new_tokens=3)
    policy = PolicyInTraining(model, collator, {row.id: row for row in rows}, settings, Accelerator())
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    assert (policy.draw([], 0), policy.mean_logp([], [])) == ([], [])
    assert calls == []
    monkeypatch.setattr("cwdpo_trainer.negatives.policy.largest", lambda accelerator, number: max(number, 2))
    assert policy.mean_logp([], []) == []
    assert len(calls) == 2  # another process has two answers to a row
    assert policy.mean_logp([3], [[[7, 2]]])[0] == policy.mean_logp([3, 4], [[[7, 2]], []])[0]
    calls.clear()
    assert policy.draw([], 0) == []
    assert 1 <= len(calls) <= 3


def test_samples_are_wrong_answers_and_restore_the_random_state(model, collator, rows):
    settings = SamplingArguments(samples=3, max_new_tokens=5)
    state = torch.random.get_rng_state()
    answers = sample_answers(model, collator, rows[:6], settings, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert answers == sample_answers(model, collator, rows[:6], settings, seed=4)
    assert answers != sample_answers(model, collator, rows[:6], settings, seed=5)
    tokenizer = collator.tokenizer
    kept = [(row, tokens) for row, of_row in zip(rows, answers, strict=False) for tokens in of_row]
    assert kept
    for row, tokens in kept:
        assert 1 <= len(tokens) <= 5
        assert tokenizer.eos_token_id not in tokens[:-1]
        assert not set(tokens) & {0, 1, 3, 4}  # pad, bos, unk, image placeholder
        assert normalize(tokenizer.decode(tokens, skip_special_tokens=True)) not in row.references


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 4},
        {"num_beams": 2},  # fewer than the samples
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"no_repeat_ngram_size": 1},
        {"top_k": 1, "repetition_penalty": 2.0, "temperature": 0.1, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
    ],
)
@pytest.mark.parametrize("shares", [False, True])
def test_samples_and_captions_do_not_depend_on_how_the_model_generates_by_default(
    model, collator, rows, monkeypatch, own, shares
):
    settings = SamplingArguments(samples=3, max_new_tokens=6)
    own_collator = collator.on_trees(model) if shares else collator

    def drawn():
        return sample_answers(model, own_collator, rows[:2], settings, seed=3)

    expected = drawn(), caption(model, collator, rows[:2], 6, 2)
    changed = copy.deepcopy(model.generation_config)
    for name, value in own.items():
        setattr(changed, name, value)
    monkeypatch.setattr(model, "generation_config", changed)
    assert drawn() == expected[0]
    if "repetition_penalty" not in own and "no_repeat_ngram_size" not in own:  # captions keep these
        assert caption(model, collator, rows[:2], 6, 2) == expected[1]


def test_right_samples_are_dropped(model, collator, rows):
    settings = SamplingArguments(samples=2, temperature=1e-4, max_new_tokens=5)
    texts = caption(model, collator, rows[:1], 5, batch_size=1)
    right = type(rows[0])(**{**vars(rows[0]), "references": tuple(texts)})
    assert sample_answers(model, collator, [right], settings, seed=0) == [[]]


def test_captions_do_not_depend_on_the_batch_size(model, collator, rows):
    one, all_at_once = (caption(model, collator, rows[:5], 4, size) for size in (1, 5))
    assert one == all_at_once


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([5, 6, 2, 0], [5, 6, 2]), ([5, 9, 2, 7], [5, 9, 2]), ([5, 9, 7], [5, 9, 2]), ([5, 6], [5, 6]), ([2], [2])],
)
def test_generated_answers_end_like_those_of_the_dataset(tokens, expected):
    """Answers stop at the end of sequence (2) or of a turn (9), and then end with 2."""
    assert ended(tokens, [2, 9]) == expected


def test_special_tokens_of_the_chosen_answer_may_be_drawn(collator, rows):
    special = collator.tokenizer.unk_token
    row = dataclasses.replace(rows[0], chosen=f"a red square {special}", references=("a red square",))
    drawn = collator.answer_tokens(row, *(f"{text} {special}" for text in ("a blue square", "a red square")))
    assert wrong_answers(collator, [row], [drawn]) == [drawn[:1]]
    assert wrong_answers(collator, [rows[0]], [drawn]) == [[]]
