"""Output to the console. Messages appear above any progress bar.

Nothing else prints or makes a progress bar. `tqdm` is imported where it is used, so that the command line starts, and
says what to install, without the `trainer` extra.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO


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
    """A progress bar of `tqdm`, over `iterable` or updated by hand. Ranks other than 0 show none."""
    from tqdm.auto import tqdm

    return tqdm(
        iterable,
        title,
        **{"dynamic_ncols": True, **options, "disable": options.get("disable") or not is_main_process()},
    )


def _write(text: str, file: TextIO) -> None:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:  # no bar either
        print(text, file=file)
    else:
        tqdm.write(text, file=file)
