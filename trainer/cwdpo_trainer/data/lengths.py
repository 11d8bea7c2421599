"""How long rows are in tokens, and what happens to those that are longer than `data.max_length`.

Tokens of an image depend on its size alone, so the processor sees a blank image of the same size, and each size
once: lengths are exact, and no image is decoded. Image tokens are never cut, prompts neither. What gives way is

    trim     the end of an answer; one that is cut has no end-of-sequence token, as it did not end there
    shrink   the resolution of the row's images, for processors that make fewer tokens of smaller ones
    skip     the row

A row that is still too long is left out, and so is one whose answers are alike after the cut.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.image_utils import make_flat_list_of_images

from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.images import IMAGE_ERRORS, ImageRef, unreadable
from cwdpo_trainer.data.rows import SHOWN, Row
from cwdpo_trainer.errors import InputError, require

SMALLEST = 1 / 64  # of an image's pixels, 1 / 8 of its sides: what `shrink` goes down to
STEPS = 8  # of the bisection between that and the whole


class Length(NamedTuple):
    """Tokens of a row: the `prompt` with its `image` tokens, and the answers with the end-of-sequence token."""

    prompt: int
    image: int
    chosen: int
    rejected: int

    @property
    def total(self) -> int:
        """Of the longer of the row's two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


class LengthMeter:
    """Row -> `Length`, as `collator` would have it. Raises `InputError` for a row that it cannot read."""

    def __init__(self, collator: PairCollator) -> None:
        processor = copy.copy(collator.processor)
        processor.image_processor = _OncePerShape(processor.image_processor)
        self.collator = PairCollator(processor)
        self.image_ids = [token for token in processor.image_token_ids if token is not None]
        self._unverified: PairCollator | None = collator

    def __call__(self, row: Row) -> Length:
        ids = self._prompt(row)
        if row.images and self._unverified is not None:
            self._verify(self._unverified, row, len(ids))
            self._unverified = None
        answers = (len(self.collator.answer_tokens(row, answer)) for answer in (row.chosen, row.rejected))
        return Length(len(ids), int(np.isin(ids, self.image_ids).sum()), *answers)

    def counts_pixels(self, row: Row) -> bool:
        """Whether the processor makes fewer tokens of smaller images."""
        sizes = [(1024, 1024), (16, 16)]
        large, small = (len(self._prompt(row, [_Blank("RGB", size)] * len(row.images))) for size in sizes)
        return small < large

    def _verify(self, collator: PairCollator, row: Row, measured: int) -> None:
        """The first row with images is also processed as it is: what this class rests on is looked at once."""
        real = collator.prompts([row])["input_ids"].shape[1]
        what = f"prompt tokens of {type(collator.processor).__name__}"
        require(real == measured, row.where, what, f"{measured}, as with blank images of the same sizes", real)

    def _prompt(self, row: Row, blanks: Sequence[ImageRef] | None = None) -> list[int]:
        blanks = [_blank(row, picture) for picture in row.images] if blanks is None else blanks
        (ids,) = self.collator.prompts([dataclasses.replace(row, images=tuple(blanks))])["input_ids"].tolist()
        return ids


class _Blank(ImageRef):
    """An image without content."""

    def __init__(self, mode: str, size: tuple[int, int]) -> None:
        self.mode, self.size = mode, size
        self.name = f"a blank image of {size[0]} x {size[1]} pixels"

    @property
    def key(self) -> str:
        return f"{self.mode} {self.size}"

    def read_bytes(self) -> bytes:
        raise NotImplementedError("a blank image has no file")

    def load(self) -> Image.Image:
        return Image.new(self.mode, self.size)


def _blank(row: Row, picture: ImageRef) -> _Blank:
    try:
        return _Blank(*picture.shape())
    except IMAGE_ERRORS as error:
        raise unreadable(row.where, picture, error) from error


class _OncePerShape:
    """An image processor that works once for all images of the same shapes, and keeps shapes without content."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._outputs: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        key = tuple((image.mode, image.size) for image in make_flat_list_of_images(images))
        if key not in self._outputs:
            outputs = self._processor(images, **options)
            for name, value in outputs.items():
                outputs[name] = _without_content(value)
            self._outputs[key] = outputs
        return copy.copy(self._outputs[key])  # processors take entries out


def _without_content(value: Any) -> Any:
    """Pixels of the same shape that take no memory; grids and masks as they are."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value


@dataclass
class Fit:
    """What became of a data set's rows: those that stay and their lengths, where those were that changed or left."""

    rows: list[Row] = field(default_factory=list)
    lengths: list[Length] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)
    shrunk: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        return self.trimmed + self.shrunk

    def report(self, name: str, max_length: int) -> str:
        total = len(self.rows) + len(self.skipped)
        changes = [
            f"{len(places)} {what} ({', '.join(places[:SHOWN])}{', ...' if len(places) > SHOWN else ''})"
            for what, places in (
                ("have an answer trimmed", self.trimmed),
                ("have smaller images", self.shrunk),
                ("are left out", self.skipped),
            )
            if places
        ]
        return f"{name}: of {total} rows " + ("; ".join(changes) or "all fit") + f" (max_length {max_length})"


def fit_rows(rows: Sequence[Row], meter: LengthMeter, max_length: int, policy: str) -> Fit:
    """Make `rows` fit into `max_length` tokens by the policy `trim`, `shrink` or `skip`.

    Raises `InputError` where no row is left, or where `shrink` cannot work with the processor.
    """
    fit = Fit()
    change: Callable[[Row, Length, LengthMeter, int], Row | None] = POLICIES[policy]
    changed = {"trim": fit.trimmed, "shrink": fit.shrunk}
    for row in tqdm(rows, "lengths of rows", delay=2, leave=False, disable=None):  # some 3 ms a row
        length = meter(row)
        fitting = row if length.total <= max_length else change(row, length, meter, max_length)
        if fitting is None:
            fit.skipped.append(row.where)
            continue
        if fitting is not row:
            changed[policy].append(row.where)
        fit.rows.append(fitting)
        fit.lengths.append(length if fitting is row else meter(fitting))
    expected = f"room for at least 1 row (data.over_length: {policy})"
    require(bool(fit.rows), "config", "data.max_length", expected, max_length)
    return fit


def _trim(row: Row, length: Length, meter: LengthMeter, max_length: int) -> Row | None:
    room = max_length - length.prompt
    if room < 1:
        return None
    trimmed = dataclasses.replace(row, max_answer=room)
    chosen, rejected = (meter.collator.answer_tokens(trimmed, answer) for answer in (row.chosen, row.rejected))
    return trimmed if chosen != rejected else None


def _shrink(row: Row, length: Length, meter: LengthMeter, max_length: int) -> Row | None:
    """The largest pixel budget that fits, by bisection in the logarithm."""
    if not row.images:
        return None
    if not meter.counts_pixels(row):
        processor = type(meter.collator.processor).__name__
        expected = f"trim or skip, as {processor} makes as many tokens from a small image as from a large one"
        raise InputError("config", "data.over_length", expected, f"shrink ({row.where} has {length.total} tokens)")
    largest = max(math.prod(picture.shape()[1]) for picture in row.images)
    best, low, high = None, SMALLEST, 1.0
    for step in range(STEPS):
        share = low if step == 0 else math.sqrt(low * high)
        smaller = dataclasses.replace(row, max_pixels=max(1, int(largest * share)))
        if meter(smaller).total <= max_length:
            best, low = smaller, share
        elif step == 0:
            return None
        else:
            high = share
    return best


def _skip(row: Row, length: Length, meter: LengthMeter, max_length: int) -> None:
    return None


POLICIES = {"trim": _trim, "shrink": _shrink, "skip": _skip}
