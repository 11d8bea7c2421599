"""Scenes of one to three handwritten digits on a 2 x 2 grid, their captions, and two kinds of wrong captions.

A caption names the position directly before the digit. The last token then says which cell to look at when the digit
is predicted, which two layers of attention learn in a few hundred steps. (With the digit first, captions stay wrong.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMPTY = len(DIGITS)  # the class of an empty cell
POSITIONS = ("topleft", "topright", "bottomleft", "bottomright")  # in reading order, like the encoder's patches
CELL = 8  # pixels per side, the size of a handwritten digit
SIZE = 2 * CELL
PROMPT = "<image> describe the scene"
# The wordings of captions: (start, separator of the items). They have equal lengths and share no word, so CIDEr rates a
# right caption the same in each of them.
STYLES = (("i see", "and"), ("there is", "then"), ("digits :", ","))
_MAX_DIGITS = 3
_BRIGHTNESS = 15  # the dataset's gray levels are 0 .. 16

Cells = tuple[int, ...]


def words() -> list[str]:
    """All distinct words of prompts and captions."""
    texts = [
        PROMPT.replace("<image>", ""),
        *DIGITS,
        *POSITIONS,
        *(part for style in STYLES for part in style),
    ]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


@dataclass(frozen=True)
class Handwriting:
    """`images` [n, 8, 8] of handwritten digits, uint8 gray levels 0 .. 240, and their labels `digits` [n]."""

    images: np.ndarray
    digits: np.ndarray


def split_handwriting(heldout_share: float, rng: random.Random) -> tuple[Handwriting, Handwriting]:
    """Shuffle the 1797 digits of scikit-learn and split them into training and held-out digits."""
    data = load_digits()
    order = list(range(len(data.target)))
    rng.shuffle(order)
    cut = round(heldout_share * len(order))
    images = (data.images * _BRIGHTNESS).astype(np.uint8)
    heldout, train = (Handwriting(images[part], data.target[part]) for part in (order[:cut], order[cut:]))
    return train, heldout


@dataclass(frozen=True)
class Scene:
    """`cells`: the digit (or `EMPTY`) at each position, in reading order; `image` [16, 16] uint8."""

    cells: Cells
    image: np.ndarray


def draw_scene(handwriting: Handwriting, rng: random.Random) -> Scene:
    """A scene with one to three digits of `handwriting` in random cells."""
    cells = [EMPTY] * len(POSITIONS)
    image = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for cell in _draw_cells(rng):
        index = rng.randrange(len(handwriting.digits))
        cells[cell] = int(handwriting.digits[index])
        row, column = (CELL * part for part in divmod(cell, 2))
        image[row : row + CELL, column : column + CELL] = handwriting.images[index]
    return Scene(tuple(cells), image)


def captions(cells: Cells) -> list[str]:
    """The correct captions of a scene, one per style, with its items in reading order."""
    items = [f"{position} {DIGITS[digit]}" for position, digit in zip(POSITIONS, cells, strict=True) if digit != EMPTY]
    return [f"{opening} {f' {joiner} '.join(items)}" for opening, joiner in STYLES]


def near_negative(cells: Cells, style: int, rng: random.Random) -> str:
    """A fluent caption in `style` with one mistake: one digit is replaced by another, or moved to an empty cell."""
    wrong = list(cells)
    cell = rng.choice(_find_cells(cells, empty=False))
    if rng.random() < 0.5:
        wrong[cell] = rng.choice([digit for digit in range(len(DIGITS)) if digit != cells[cell]])
    else:
        wrong[cell], wrong[rng.choice(_find_cells(cells, empty=True))] = EMPTY, cells[cell]
    return captions(tuple(wrong))[style]


def easy_negative(rng: random.Random) -> str:
    """The shuffled words of another scene's caption, with a digit first, which no real caption has.

    A trained model finds it unlikely from the first word on, so pushing it down further teaches nothing.
    """
    cells = [EMPTY] * len(POSITIONS)
    for cell in _draw_cells(rng):
        cells[cell] = rng.randrange(len(DIGITS))
    shuffled = rng.choice(captions(tuple(cells))).split()
    rng.shuffle(shuffled)
    first = next(index for index, word in enumerate(shuffled) if word in DIGITS)
    shuffled[0], shuffled[first] = shuffled[first], shuffled[0]
    return " ".join(shuffled)


def _draw_cells(rng: random.Random) -> list[int]:
    return rng.sample(range(len(POSITIONS)), rng.randint(1, _MAX_DIGITS))


def _find_cells(cells: Sequence[int], empty: bool) -> list[int]:
    return [cell for cell, digit in enumerate(cells) if (digit == EMPTY) is empty]
