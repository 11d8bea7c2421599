"""Console output. Every message of the trainer goes through `say` or `say_error`, so no other module prints."""

from __future__ import annotations

import os
import sys

from tqdm.auto import tqdm


def is_main_process() -> bool:
    """Whether this is the only process, or rank 0. torchrun and `accelerate launch` set RANK for each process."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str = "") -> None:
    """Print `text` to stdout, above any progress bar. Ranks other than 0 print nothing."""
    if is_main_process():
        tqdm.write(text)


def say_error(text: str) -> None:
    """Print `text` to stderr, in every process: an error may occur in one rank only."""
    tqdm.write(text, file=sys.stderr)
