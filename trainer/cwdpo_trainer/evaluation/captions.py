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
    papers print it. `matches`: for each caption, whether it equals a reference. `by_reference`: the share of the
    captions that equal their row's first reference, second reference and so on; it shows which of several wordings a
    model uses. Empty unless all rows have the same number of references, at least 2.
    """

    exact_match: float
    cider: float
    matches: list[bool]
    by_reference: list[float]

    def metrics(self) -> dict[str, float]:
        """The scores by their names in metrics.json."""
        shares = {f"equal_to_reference_{number}": share for number, share in enumerate(self.by_reference, 1)}
        return {"exact_match": self.exact_match, "cider": self.cider, **shares}


def score_captions(captions: Sequence[str], rows: Sequence[Row]) -> CaptionScores:
    """Score one caption per row against the row's references.

    Case and extra white space are ignored. N-gram frequencies for CIDEr-D come from the references of these rows, as
    in pycocoevalcap. Its Java tokenizer, which removes punctuation, is not used.
    """
    references = [[normalize(text) for text in row.references] for row in rows]
    candidates = [normalize(text) for text in captions]
    matches = [text in texts for text, texts in zip(candidates, references, strict=True)]
    cider = 100 * fmean(cider_d(candidates, references))
    return CaptionScores(fmean(matches), cider, matches, _by_reference(candidates, references))


def _by_reference(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    counts = {len(texts) for texts in references}
    if len(counts) > 1 or counts <= {0, 1}:
        return []
    columns = zip(*references, strict=True)
    return [fmean(map(str.__eq__, candidates, column)) for column in columns]
