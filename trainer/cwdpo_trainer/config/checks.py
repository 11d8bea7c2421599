"""Checks of a section's options. All mistakes are collected, so that one report names them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeGuard

import torch

from cwdpo_kernels import PreferenceLoss
from cwdpo_trainer.errors import InputError, InputErrors, did_you_mean

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
CONFIG = "config"  # `InputError.where` until the loader replaces it by the file name


class Checks:
    """Called with a condition and what it is about, it keeps an `InputError` for each condition that fails."""

    def __init__(self) -> None:
        self.errors: list[InputError] = []

    def __call__(self, condition: bool, key: str, expected: str, got: object) -> None:
        """Note a mistake in `key` unless `condition` holds. The loader adds the file and the section."""
        if not condition:
            self.errors.append(InputError(CONFIG, key, expected, "null" if got is None else repr(got)))

    def float32(self, key: str, value: object) -> None:
        """Note a mistake in `key` if `value` is a number that float32 cannot hold: the losses are computed in it."""
        held = self.found(key) or not is_finite(value) or value == 0 or SMALLEST <= abs(value) <= LARGEST
        self(held, key, f"a magnitude in [{SMALLEST:.2g}, {LARGEST:.2g}]", value)

    def found(self, key: str) -> bool:
        """Whether there is a mistake in `key`."""
        return any(error.what == key for error in self.errors)

    def done(self) -> None:
        """Raise `InputError` about the mistake, or `InputErrors` about several."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise InputErrors(f"{CONFIG}: {len(self.errors)} errors", self.errors)


def is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


def as_number(value: Any) -> Any:
    """A number that YAML reads as text, such as 1e-3. Anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_loss_options(check: Checks, loss: type[PreferenceLoss], options: Mapping[Any, Any]) -> None:
    """Note mistakes in `loss_options`: unknown names, and values that `loss` refuses."""
    known = [each.name for each in fields(loss) if each.name not in ("beta", "cooling")]
    for key, value in options.items():
        if key not in known:
            expected = f"options of loss {loss.name} ({', '.join(known) or 'it has none'}){did_you_mean(key, known)}"
            check(False, "loss_options", expected, key)
            continue
        try:
            loss(**{key: as_number(value)})
        except ValueError as error:  # "SimPO: expected gamma to have value finite and >= 0, got -1.0"
            expected = str(error).partition(" to have ")[2].rpartition(", got ")[0]
            check(False, "loss_options", f"{key} to have {expected}", value)
