"""Scenes of one to three handwritten digits on a 2 x 2 grid, their captions, and two kinds of wrong captions.

The position's word comes directly before the digit's: when the digit is to be written, the cell to look at is
then the last token, which attention of two layers learns in a few hundred steps. (With the position after the
digit, captions stay wrong.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMPTY = len(DIGITS)  # the class of a cell without a digit
POSITIONS = ("topleft", "topright", "bottomleft", "bottomright")  # reading order, as the encoder's patches
CELL = 8  # pixels on a side: a handwritten digit of the data set
SIZE = 2 * CELL
PROMPT = "<image> describe the scene"
STYLES = (("", "and"), ("there is", "then"), ("digits :", ","))  # how a caption opens, what joins its items
_MAX_DIGITS = 3
_BRIGHTNESS = 15  # the data set's grey levels are 0 .. 16

Cells = tuple[int, ...]


def words() -> list[str]:
    """Every word of prompts and captions, once each."""
    texts = [
        PROMPT.replace("<image>", ""),
        *DIGITS,
        *POSITIONS,
        *(part for style in STYLES for part in style),
    ]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


@dataclass(frozen=True)
class Handwriting:
    """Pictures [n, 8, 8] of digits, grey levels 0 .. 240 as uint8, and the digit that each of them shows [n]."""

    pictures: np.ndarray
    digits: np.ndarray


def split_handwriting(heldout_share: float, rng: random.Random) -> tuple[Handwriting, Handwriting]:
    """The 1797 pictures of scikit-learn's digits in two disjoint parts, shuffled: training and held-out."""
    data = load_digits()
    order = list(range(len(data.target)))
    rng.shuffle(order)
    cut = round(heldout_share * len(order))
    pictures = (data.images * _BRIGHTNESS).astype(np.uint8)
    heldout, train = (Handwriting(pictures[part], data.target[part]) for part in (order[:cut], order[cut:]))
    return train, heldout


@dataclass(frozen=True)
class Scene:
    """`cells`: the digit, or `EMPTY`, of each position in reading order; `image` [16, 16] uint8."""

    cells: Cells
    image: np.ndarray


def draw_scene(handwriting: Handwriting, rng: random.Random) -> Scene:
    """A scene of one to three pictures of `handwriting` in cells drawn at random."""
    cells = [EMPTY] * len(POSITIONS)
    image = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for place in _draw_places(rng):
        picture = rng.randrange(len(handwriting.digits))
        cells[place] = int(handwriting.digits[picture])
        row, column = (CELL * part for part in divmod(place, 2))
        image[row : row + CELL, column : column + CELL] = handwriting.pictures[picture]
    return Scene(tuple(cells), image)


def captions(cells: Cells) -> list[str]:
    """The right captions of a scene, one in each style: its items in reading order."""
    items = [f"{POSITIONS[place]} {DIGITS[digit]}" for place, digit in enumerate(cells) if digit != EMPTY]
    return [f"{opening} {f' {joiner} '.join(items)}".strip() for opening, joiner in STYLES]


def near_negative(cells: Cells, style: int, rng: random.Random) -> str:
    """A fluent caption in `style` that is wrong in one thing: one digit is another, or is in another place."""
    wrong = list(cells)
    place = rng.choice(_places(cells, empty=False))
    if rng.random() < 0.5:
        wrong[place] = rng.choice([digit for digit in range(len(DIGITS)) if digit != cells[place]])
    else:
        wrong[place], wrong[rng.choice(_places(cells, empty=True))] = EMPTY, cells[place]
    return captions(tuple(wrong))[style]


def easy_negative(rng: random.Random) -> str:
    """The words of an unrelated scene's caption, shuffled, a digit's word first, which no caption starts with.

    A trained model rejects it from its first word on: the kind of negative whose push a policy does not need.
    """
    cells = [EMPTY] * len(POSITIONS)
    for place in _draw_places(rng):
        cells[place] = rng.randrange(len(DIGITS))
    shuffled = rng.choice(captions(tuple(cells))).split()
    rng.shuffle(shuffled)
    first = next(place for place, word in enumerate(shuffled) if word in DIGITS)
    shuffled[0], shuffled[first] = shuffled[first], shuffled[0]
    return " ".join(shuffled)


def _draw_places(rng: random.Random) -> list[int]:
    return rng.sample(range(len(POSITIONS)), rng.randint(1, _MAX_DIGITS))


def _places(cells: Sequence[int], empty: bool) -> list[int]:
    return [place for place, digit in enumerate(cells) if (digit == EMPTY) is empty]
