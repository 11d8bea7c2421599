"""CIDEr-D: how well a caption agrees with its references, by the n-grams that they share.

For n = 1..4, c_g and r_g are the TF-IDF weights of n-gram g in a candidate c and in a reference r:

    c_g = (count of g in c) * ln(I / I_g)

with I images, I_g of which have g in a reference (at least 1). The score of a candidate is the mean over n and over
its references of

    10 * exp(-(words(c) - words(r))^2 / (2 * 6^2)) * sum_g min(c_g, r_g) * r_g / (|c| * |r|)

It lies in [0, 10]; papers print 100 times the mean over images. With a single image every weight is ln 1 = 0, and so
is the score. Source: Vedantam et al., CVPR 2015 (arXiv 1411.5726), section 3 and CIDEr-D.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MAX_N = 4
SIGMA = 6.0  # words

Ngram = tuple[str, ...]


class _Caption(NamedTuple):
    """A caption as weights by n-gram and their norms, one of each for n = 1..4."""

    words: int
    weights: list[dict[Ngram, float]]
    norms: list[float]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The CIDEr-D of each image's candidate against the image's references. Words are separated by white space.

    Raises `ValueError` unless there are as many candidates as lists of references.
    """
    images_with = Counter(
        ngram for texts in references for ngram in {ngram for text in texts for ngram in _count_ngrams(text)}
    )

    def weigh(text: str) -> _Caption:
        weights: list[dict[Ngram, float]] = [{} for _ in range(MAX_N)]
        for ngram, count in _count_ngrams(text).items():
            weights[len(ngram) - 1][ngram] = count * math.log(len(references) / max(1, images_with[ngram]))
        return _Caption(len(text.split()), weights, [math.hypot(*of_n.values()) for of_n in weights])

    scores = []
    for candidate, texts in zip(candidates, references, strict=True):
        caption = weigh(candidate)
        similarities = [_similarity(caption, weigh(text)) for text in texts]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def _count_ngrams(text: str) -> Counter[Ngram]:
    words = text.split()
    return Counter(tuple(words[at : at + n]) for n in range(1, MAX_N + 1) for at in range(len(words) - n + 1))


def _similarity(candidate: _Caption, reference: _Caption) -> float:
    """The clipped cosine similarity of two captions, averaged over n, times the penalty on their lengths."""
    total = 0.0
    for n in range(MAX_N):
        c, r = candidate.weights[n], reference.weights[n]
        overlap = sum(min(c[ngram], r[ngram]) * r[ngram] for ngram in c if ngram in r)
        if overlap > 0:  # else a norm may be 0
            total += overlap / (candidate.norms[n] * reference.norms[n])
    return math.exp(-((candidate.words - reference.words) ** 2) / (2 * SIGMA**2)) * total / MAX_N
