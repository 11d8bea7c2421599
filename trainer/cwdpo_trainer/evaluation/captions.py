"""How good captions are: exact match with a reference, and CIDEr-D."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.evaluation.cider import cider_d
from cwdpo_trainer.negatives.sampling import normalize


class CaptionScores(NamedTuple):
    """Scores of a list of captions.

    `exact_match`: share of the captions that equal one of their references. `cider`: 100 times the mean CIDEr-D, as
    papers print it. `matches`: for each caption, whether it equals a reference.
    """

    exact_match: float
    cider: float
    matches: list[bool]


def score_captions(captions: Sequence[str], rows: Sequence[Row]) -> CaptionScores:
    """Score one caption per row against the row's references.

    Case and extra white space are ignored. N-gram frequencies for CIDEr-D come from the references of these rows, as
    in pycocoevalcap. Its Java tokenizer, which removes punctuation, is not used.
    """
    references = [[normalize(text) for text in row.references] for row in rows]
    candidates = [normalize(text) for text in captions]
    matches = [text in texts for text, texts in zip(candidates, references, strict=True)]
    return CaptionScores(fmean(matches), 100 * fmean(cider_d(candidates, references)), matches)
