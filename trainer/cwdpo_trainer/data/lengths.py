"""Lengths of rows in tokens, and what happens to rows longer than `data.max_length`.

The number of an image's tokens depends on its size alone. So the meter passes blank images of the same sizes to the
processor, once per size: lengths are exact, and no image is decoded. Prompts and image tokens are never cut. The
policies are

    trim     cut the ends of the answers; a cut answer has no end-of-sequence token, as it did not end there
    shrink   lower the resolution of the row's images, for processors that make fewer tokens from smaller images
    skip     skip the row

A row that still does not fit is skipped, and so is one whose answers are equal after the cut.
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
from transformers.image_utils import make_flat_list_of_images

from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.images import IMAGE_ERRORS, ImageRef, unreadable
from cwdpo_trainer.data.rows import SHOWN_ROWS, Row
from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.reporter import progress

SMALLEST_SHARE = 1 / 64  # of an image's pixels (1 / 8 of its sides): the lowest resolution that `shrink` tries
BISECTIONS = 8  # steps of `shrink` between that and the full resolution


class Length(NamedTuple):
    """Tokens of a row: of its `prompt`, of the `image` tokens in it, and of its answers (end of sequence included)."""

    prompt: int
    image: int
    chosen: int
    rejected: int

    @property
    def total(self) -> int:
        """Tokens of the prompt and the longer answer."""
        return self.prompt + max(self.chosen, self.rejected)


class LengthMeter:
    """Row -> `Length`, as in a batch of `collator`.

    The first row with images is also processed as it is, to verify that blank images give the same length. `measure`
    does without. Raises `InputError` about an image that cannot be read, and what the processor raises.
    """

    def __init__(self, collator: PairCollator) -> None:
        processor = copy.copy(collator.processor)
        if not collator.is_text_only:
            processor.image_processor = _OncePerShape(processor.image_processor)
        self.collator = copy.copy(collator)
        self.collator.processor = processor
        self.image_ids = [token for token in processor.image_token_ids if token is not None]
        self._unverified: PairCollator | None = collator

    def __call__(self, row: Row) -> Length:
        length = self.measure(row)
        if row.images and self._unverified is not None:
            self._verify(self._unverified, row, length.prompt)
            self._unverified = None
        return length

    def measure(self, row: Row) -> Length:
        """The length of a row with blank images."""
        ids = self.prompt_ids(row)
        answers = self.collator.answer_tokens(row, row.chosen, row.rejected)
        return Length(len(ids), int(np.isin(ids, self.image_ids).sum()), *map(len, answers))

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens of a row's prompt with blank images."""
        return self._prompt_ids(row, [_blank(row, image) for image in row.images])

    def counts_pixels(self, row: Row) -> bool:
        """Whether the processor makes fewer tokens from smaller images."""
        sizes = [(1024, 1024), (16, 16)]
        large, small = (len(self._prompt_ids(row, [_BlankImage("RGB", size)] * len(row.images))) for size in sizes)
        return small < large

    def _verify(self, collator: PairCollator, row: Row, measured: int) -> None:
        real = collator.prompts([row])["input_ids"].shape[1]
        what = f"prompt tokens of {type(collator.processor).__name__}"
        require(real == measured, row.where, what, f"{measured}, as with blank images of the same sizes", real)

    def _prompt_ids(self, row: Row, images: Sequence[ImageRef]) -> list[int]:
        (ids,) = self.collator.prompts([dataclasses.replace(row, images=tuple(images))])["input_ids"].tolist()
        return ids


class _BlankImage(ImageRef):
    """A black image of a given mode and size."""

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


def _blank(row: Row, image: ImageRef) -> _BlankImage:
    try:
        return _BlankImage(*image.shape())
    except IMAGE_ERRORS as error:
        raise unreadable(row.where, image, error) from error


class _OncePerShape:
    """An image processor that runs once per combination of image shapes, and keeps the shapes of its outputs."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._outputs: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        flat: Any = make_flat_list_of_images(images)
        key = tuple((image.mode, image.size) for image in flat)
        if key not in self._outputs:
            outputs = self._processor(images, **options)
            for name, value in outputs.items():
                outputs[name] = _without_content(value)
            self._outputs[key] = outputs
        return copy.copy(self._outputs[key])  # a processor removes entries from it


def _without_content(value: Any) -> Any:
    """Zeros of the same shape that share one element of memory, instead of pixels. Grids and masks are kept."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.new_zeros(()).expand(value.shape)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return np.broadcast_to(np.zeros((), value.dtype), value.shape)
    return value


@dataclass
class Fit:
    """A dataset after `fit_rows`: the remaining rows with their lengths, and where rows were changed or skipped."""

    rows: list[Row] = field(default_factory=list)
    lengths: list[Length] = field(default_factory=list)
    trimmed: list[str] = field(default_factory=list)
    shrunk: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[str]:
        return self.trimmed + self.shrunk

    def report(self, name: str, max_length: int) -> str:
        """One line: how many rows were changed or skipped, and the first of them."""
        total = len(self.rows) + len(self.skipped)
        changes = [
            f"{len(rows)} of {total} rows {what} ({', '.join(rows[:SHOWN_ROWS] + ['...'] * (len(rows) > SHOWN_ROWS))})"
            for what, rows in (
                ("have trimmed answers", self.trimmed),
                ("have smaller images", self.shrunk),
                ("are skipped", self.skipped),
            )
            if rows
        ]
        return f"{name}, max_length {max_length}: " + ("; ".join(changes) or f"all {total} rows fit")


def fit_rows(rows: Sequence[Row], meter: LengthMeter, max_length: int, policy: str) -> Fit:
    """Make `rows` fit into `max_length` tokens by `policy`: `trim`, `shrink` or `skip`.

    Raises `InputError` if no row remains, or if `shrink` cannot work with the processor.
    """
    fit = Fit()
    change: Callable[[Row, Length, LengthMeter, int], Row | None] = POLICIES[policy]
    changed = {"trim": fit.trimmed, "shrink": fit.shrunk}
    for row in progress(rows, "lengths of rows", delay=2, leave=False):  # about 3 ms per row
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
    chosen, rejected = meter.collator.answer_tokens(trimmed, row.chosen, row.rejected)
    return trimmed if chosen != rejected else None


def _shrink(row: Row, length: Length, meter: LengthMeter, max_length: int) -> Row | None:
    """Find the largest pixel budget that fits, by bisection on a logarithmic scale."""
    if not row.images:
        return None
    if not meter.counts_pixels(row):
        processor = type(meter.collator.processor).__name__
        expected = f"trim or skip, as {processor} makes as many tokens from a small image as from a large one"
        raise InputError("config", "data.over_length", expected, f"shrink ({row.where} has {length.total} tokens)")
    largest = max(math.prod(image.shape()[1]) for image in row.images)
    best, low, high = None, SMALLEST_SHARE, 1.0
    for step in range(BISECTIONS):
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
