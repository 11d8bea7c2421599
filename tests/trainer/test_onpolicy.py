"""On-policy negatives: who gets one, and which, depends on seed, step, row and pool alone."""

from __future__ import annotations

import random

import pytest
import torch

from cwdpo_trainer.arguments import SamplingArguments
from cwdpo_trainer.captions import score_captions
from cwdpo_trainer.onpolicy import OnPolicyPool, uniform
from cwdpo_trainer.sampling import caption, normalise, sample_answers

ROWS = list(range(200))
DATASET = [[-1]] * len(ROWS)


def draw(rows, seed):
    return [[[row, seed % 97], [row, seed % 89]] for row in rows]


def never(rows, seed):
    raise AssertionError("nothing should be drawn")


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_fraction_of_the_pairs_is_on_policy(fraction, low, high):
    mixed, drawn = OnPolicyPool(fraction, 10, seed=1).mix(ROWS, DATASET, 3, draw if fraction else never)
    assert low <= drawn <= high
    assert sum(tokens != [-1] for tokens in mixed) == drawn
    assert all(tokens in ([-1], *draw([row], 0)[0]) or tokens[0] == row for row, tokens in enumerate(mixed))


def test_the_choice_does_not_depend_on_order_history_or_random_state():
    first = OnPolicyPool(0.5, 10, seed=1).mix(ROWS, DATASET, 3, draw)
    random.seed(99)
    torch.manual_seed(99)
    assert OnPolicyPool(0.5, 10, seed=1).mix(ROWS, DATASET, 3, draw) == first
    alone, _ = OnPolicyPool(0.5, 10, seed=1).mix(ROWS[7:8], DATASET[:1], 3, draw)
    assert (alone[0] == [-1]) == (first[0][7] == [-1])
    assert OnPolicyPool(0.5, 10, seed=1).mix(ROWS, DATASET, 4, draw) != first
    assert OnPolicyPool(0.5, 10, seed=2).mix(ROWS, DATASET, 3, draw) != first


def test_uniform_is_the_same_in_every_process():
    assert uniform(0, 1, 2) == pytest.approx(0.1922018794572527)
    assert 0 <= min(uniform(place) for place in range(1000)) < 0.01


def test_drawn_answers_serve_until_they_are_stale():
    pool = OnPolicyPool(1.0, refresh_steps=3, seed=0)
    pool.mix([5], [[-1]], 0, draw)
    pool.mix([5], [[-1]], 2, never)
    asked = []
    pool.mix([5, 6], [[-1]] * 2, 3, lambda rows, seed: asked.extend(rows) or draw(rows, seed))
    assert asked == [5, 6]
    assert pool.answers[5][0] == 3


def test_a_row_without_a_wrong_sample_keeps_its_negative():
    mixed, drawn = OnPolicyPool(1.0, 3, seed=0).mix([5, 6], [[1], [2]], 0, lambda rows, seed: [[], [[9]]])
    assert (mixed, drawn) == ([[1], [9]], 1)


def test_a_stored_pool_continues_exactly(tmp_path):
    pool = OnPolicyPool(0.7, 4, seed=3)
    pool.mix(ROWS, DATASET, 2, draw)
    pool.save(tmp_path / "pool.json")
    resumed = OnPolicyPool(0.7, 4, seed=3)
    resumed.load(tmp_path / "pool.json")
    for step in range(3, 9):
        assert resumed.mix(ROWS, DATASET, step, draw) == pool.mix(ROWS, DATASET, step, draw)


def test_samples_are_wrong_answers_and_leave_the_random_state(model, collator, rows):
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
        assert not set(tokens) & {0, 1, 3, 4}  # pad, bos, unk and image placeholder
        assert normalise(tokenizer.decode(tokens, skip_special_tokens=True)) not in row.references


def test_right_samples_are_dropped(model, collator, rows):
    settings = SamplingArguments(samples=2, temperature=1e-4, max_new_tokens=5)
    texts = caption(model, collator, rows[:1], 5, batch_size=1)
    right = type(rows[0])(**{**vars(rows[0]), "references": tuple(texts)})
    assert sample_answers(model, collator, [right], settings, seed=0) == [[]]


def test_captions_do_not_depend_on_the_batch(model, collator, rows):
    one, all_at_once = (caption(model, collator, rows[:5], 4, size) for size in (1, 5))
    assert one == all_at_once


def test_scores_of_captions(rows):
    perfect = score_captions(["The  red square", "a green square", "a blue square"], rows[:3])
    assert (perfect.exact_match, perfect.matches) == (1.0, [True] * 3)
    worse = score_captions(["a red square", "a red square", "and and"], rows[:3])
    assert worse.matches == [True, False, False]
    assert worse.exact_match == pytest.approx(1 / 3)
    assert 0 < worse.cider < perfect.cider
