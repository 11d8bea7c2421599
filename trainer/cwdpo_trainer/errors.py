"""What the trainer says when the user's input is wrong, which the command line prints as it is: one line, or
one more for each bad row of a data set."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """A mistake in a configuration file, a data set or a run folder; the message names the place."""


def require(condition: bool, where: str, arg: str, prop: str, expected: Any, actual: Any) -> None:
    """Raise `InputError` unless `condition` holds: where, which argument, what was expected, what came."""
    if not condition:
        raise InputError(f"{where}: expected {arg} to have {prop} {expected}, got {actual}")
