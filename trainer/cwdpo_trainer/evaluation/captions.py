"""How good captions are: exact match with a reference, and CIDEr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pycocoevalcap.cider.cider import Cider

from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.negatives.sampling import normalise


class CaptionScores(NamedTuple):
    """`exact_match`: share of captions that equal a reference, `matches`: which; `cider` x 100, as usual."""

    exact_match: float
    cider: float
    matches: list[bool]


def score_captions(captions: Sequence[str], rows: Sequence[Row]) -> CaptionScores:
    """Scores of one caption for each row against the row's references.

    Captions are compared in lower case, split at white space. The weights of CIDEr's n-grams come from the
    references of these rows, as in the reference implementation (pycocoevalcap), less its Java tokenizer.
    """
    references = {place: [normalise(text) for text in row.references] for place, row in enumerate(rows)}
    answers = {place: [normalise(text)] for place, text in enumerate(captions)}
    matches = [answers[place][0] in references[place] for place in references]
    cider, _ = Cider().compute_score(references, answers)
    return CaptionScores(sum(matches) / len(matches), 100 * float(cider), matches)
