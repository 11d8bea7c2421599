"""Scores of captions: exact match, and CIDEr-D against the reference implementation in pycocoevalcap."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from pycocoevalcap.cider.cider import Cider

from cwdpo_trainer.evaluation.captions import score_captions
from cwdpo_trainer.evaluation.cider import cider_d
from cwdpo_trainer.recipes.digits.scenes import captions, draw_scene, split_handwriting

SCENES = [
    ["a red square", "the red square", "one square that is red"],
    ["a green square left of a blue square", "the green square is on the left"],
    ["a blue square above and a red square below"],
]
RIGHT = ["a red square", "a green square left of a blue square", "a blue square above and a red square below"]


def pycocoevalcap(candidates: list[str], references: list[list[str]]) -> list[float]:
    _, scores = Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)})
    return scores.tolist()


def random_captions(seed: int) -> tuple[list[str], list[list[str]]]:
    """40 images with 1 to 5 references over 12 words, a third of the candidates cut out of a reference."""
    source = random.Random(seed)

    def sentence() -> str:
        return " ".join(source.choices("abcdefghijkl", k=source.randint(1, 15)))

    references = [[sentence() for _ in range(source.randint(1, 5))] for _ in range(40)]
    candidates = [source.choice(texts)[: source.randint(1, 20)] if source.random() < 1 / 3 else sentence()
                  for texts in references]  # fmt: skip
    return candidates, references


@pytest.mark.parametrize("seed", range(5))
def test_cider_of_random_captions(seed):
    candidates, references = random_captions(seed)
    scores = cider_d(candidates, references)
    assert scores == pytest.approx(pycocoevalcap(candidates, references), rel=1e-9, abs=1e-9)
    assert min(scores) < 1 < max(scores)


@pytest.mark.parametrize(
    "candidates",
    [
        RIGHT,
        ["", *RIGHT[1:]],
        ["", "", ""],
        ["red", "left", "above"],  # no n-gram but single words
        ["red red red red red red", "the the the the", "a a a a a a a a a a"],
        ["a purple cube", "nothing of the kind", "zebra"],  # words of no reference
        [" ".join(["a red square"] * 20), *RIGHT[1:]],  # far longer than the references
        [RIGHT[0]] * 3,
        ["A RED SQUARE", *RIGHT[1:]],  # another word than "red": the caller lowers the case
        [f"\u00a0{RIGHT[0]}\u2003", *RIGHT[1:]],
    ],
)
def test_cider_of_edge_cases(candidates):
    scores = cider_d(candidates, SCENES)
    assert scores == pytest.approx(pycocoevalcap(candidates, SCENES), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "references",
    [
        [["a red square"], ["a red square"], ["a red square"]],  # all n-grams in all images: weights are ln 1 = 0
        [["a red square", "a red square"], ["a blue square", "a blue square"]],
        [["ein grünes Quadrat", "un carré vert"], ["緑 の 四角", "青 い 四角"], ["🟥 🟦", "🟦 🟥"]],
        [["only one image", "and its two references"]],
        [["square"], ["circle"]],
        [["", "a red square"], ["a blue square"]],
    ],
)
def test_cider_of_unusual_references(references):
    for candidates in ([texts[0] for texts in references], [texts[-1] for texts in reversed(references)]):
        assert cider_d(candidates, references) == pytest.approx(pycocoevalcap(candidates, references), abs=1e-9)


def test_cider_of_a_perfect_caption_is_ten():
    """If each n-gram is in one image only, and the references agree."""
    references = [["one two three four"] * 2, ["five six seven eight"]]
    assert cider_d(["one two three four", "five six seven eight"], references) == pytest.approx([10, 10])


def test_each_image_needs_a_candidate():
    with pytest.raises(ValueError, match="zip"):
        cider_d(["a red square"], SCENES)


def test_scores_of_captions(rows):
    perfect = score_captions(["The  red square", "a green square", "a blue square"], rows[:3])
    assert (perfect.exact_match, perfect.matches) == (1.0, [True] * 3)
    assert perfect.by_reference == pytest.approx([2 / 3, 1 / 3])
    worse = score_captions(["a red square", "a red square", "and and"], rows[:3])
    assert worse.matches == [True, False, False]
    assert worse.exact_match == pytest.approx(1 / 3)
    assert 0 < worse.cider < perfect.cider


def test_the_shares_of_the_wordings(rows):
    wordings = [["a red square", "the red one"], ["a green square", "the green one"], ["a blue square", "the blue one"]]
    rows = [replace(row, references=texts) for row, texts in zip(rows, wordings, strict=False)]
    scores = score_captions(["the red one", "a green square", "The blue  one"], rows)
    assert scores.by_reference == pytest.approx([1 / 3, 2 / 3])
    assert {"equal_to_reference_1", "equal_to_reference_2"} < scores.metrics().keys()
    rows[0] = replace(rows[0], references=["a red square"])  # of another number: the shares would mean nothing
    assert score_captions(["a red square", "a green square", "a blue square"], rows).by_reference == []


def test_the_digits_task_rates_right_captions_alike_in_every_wording():
    _, heldout = split_handwriting(0.2, random.Random(0))
    source = random.Random(1)
    references = [captions(draw_scene(heldout, source).cells) for _ in range(64)]
    scores = [cider_d(list(candidates), references) for candidates in zip(*references, strict=True)]
    for of_wording in scores[1:]:
        assert of_wording == pytest.approx(scores[0], rel=1e-12)
