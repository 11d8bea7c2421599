"""Output to the console. Messages appear above any progress bar.

Nothing else prints or makes a progress bar. `tqdm` is imported where it is used, so that the command line starts, and
says what to install, without the `trainer` extra.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

SECONDS = 30.0  # between the lines of a redirected log


def is_main_process() -> bool:
    """Whether this process prints. Launchers set RANK in each process."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str = "") -> None:
    """Print `text` to stdout, above any progress bar. Ranks other than 0 print nothing."""
    if is_main_process():
        _write(text, sys.stdout)


def say_error(text: str) -> None:
    """Print `text` to stderr, in every process: an error may occur in one rank only."""
    _write(text, sys.stderr)


def progress(iterable: Iterable[Any] | None, title: str, **options: Any) -> Any:
    """A progress bar of `tqdm`, over `iterable` or updated by hand. Ranks other than 0 show none.

    Into a file or a pipe, it writes a line every `SECONDS` seconds and at the end instead.
    """
    from tqdm.auto import tqdm

    options = {**options, "disable": options.get("disable") or not is_main_process()}
    if not sys.stderr.isatty():
        return _lines(tqdm)(iterable, title, **{**options, "mininterval": SECONDS, "leave": False})
    return tqdm(iterable, title, **{"dynamic_ncols": True, **options})


@functools.cache
def _lines(tqdm: Any) -> Any:
    class Lines(tqdm):
        """A bar that writes lines: every `SECONDS` seconds, and at the end."""

        shown = 0
        disable: bool

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if self.n and self.n != self.shown:
                self.shown = self.n
                of = "" if self.total is None else f" of {self.total}"
                self.fp.write(f"{self.desc.removesuffix(': ')}: {self.n}{of}\n")
            return True

        def close(self) -> None:
            if not self.disable:
                if self._time() - self.start_t >= self.delay:
                    self.display()
                self.disable = True  # tqdm would clear its line

    return Lines


def _encodable(text: str, encoding: str, errors: str) -> str:
    """`text` with escapes for what `encoding` lacks: a file's name may be in another one."""
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _write(text: str, file: TextIO) -> None:
    text = _encodable(text, getattr(file, "encoding", None) or "utf-8", getattr(file, "errors", None) or "strict")
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:  # no bar either
        print(text, file=file)
    else:
        tqdm.write(text, file=file)
