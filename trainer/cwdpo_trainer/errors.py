"""Errors about the user's input. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """A mistake in a config file, a dataset, a run folder or on the command line.

    The message is "where: what: expected EXPECTED, got GOT", or "where: what: GOT" without `expected`.

    - `where`: a file, "file:line", "dataset[index]", "command line", or "config" for a config key in an unknown file.
    - `what`: the key, column or property that is wrong; may be "".
    - `expected`: a phrase that continues "expected ..."; "" if `got` says it all.
    - `got`: what was found instead. Without `expected`, the whole problem: "no such file".

    `where` alone may be a complete message, because torch rebuilds an exception of a DataLoader worker from its text.
    """

    def __init__(self, where: str, what: str = "", expected: Any = "", got: Any = "") -> None:
        self.where, self.what, self.expected, self.got = where, what, str(expected), str(got)
        super().__init__(self.where, self.what, self.expected, self.got)

    @property
    def mismatch(self) -> str:
        """The message without `where` and `what`. If `where` is the complete message, all of it."""
        return f"expected {self.expected}, got {self.got}" if self.expected else self.got or self.where

    def __str__(self) -> str:
        if not (self.expected or self.got):
            return self.where
        return ": ".join(part for part in (self.where, self.what, self.mismatch) if part)


class InputErrors(InputError):
    """Several mistakes at once. The message is `title` and a line for each of `errors`, at most `shown` of them."""

    def __init__(self, title: str, errors: Sequence[InputError], shown: int | None = None) -> None:
        super().__init__(title)
        self.errors = tuple(errors)
        self.shown = shown

    def __str__(self) -> str:
        limited = self.shown is not None and len(self.errors) > self.shown
        title = f"{self.where}; the first {self.shown}:" if limited else f"{self.where}:"
        return "\n  ".join([title, *map(str, self.errors[: self.shown])])


def require(condition: bool, where: str, what: str, expected: Any, got: Any) -> None:
    """Raise `InputError(where, what, expected, got)` unless `condition` holds."""
    if not condition:
        raise InputError(where, what, expected, got)


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """ " (did you mean 'NAME'?)" with the name in `known` that is closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def surrogate_in(text: str) -> int | None:
    """The index of the first half of a surrogate pair in `text`, which no file and no tokenizer can take; else None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def shorten(text: object, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters.

    Control characters, and others that a terminal does not show, are written as Python's escapes: the text may come
    from a file or a server.
    """
    line = " ".join(str(text).split())
    if not line.isprintable():
        escape = "unicode_escape"
        line = "".join(one if one.isprintable() else one.encode(escape).decode() for one in line[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def describe(error: Exception, limit: int = 300) -> str:
    """The type and message of another library's exception, on one line of at most `limit` characters."""
    return shorten(f"{type(error).__name__}: {error}", limit)
