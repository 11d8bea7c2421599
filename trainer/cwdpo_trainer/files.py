"""Files that are there as a whole or not at all: written beside their place and then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cwdpo_trainer.errors import InputError, describe, require


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it becomes `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: savers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As `replacing`, for a folder that is not there yet."""
    temporary = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(path)


def read_text(path: Path) -> str:
    """The text of a file of the user's. Raises `InputError` if there is none, or if it cannot be read as UTF-8."""
    try:
        require(path.is_file(), str(path), "", "an existing file", "a folder" if path.is_dir() else "no such file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "", "UTF-8 text", describe(error)) from error
    except OSError as error:
        raise InputError(str(path), "", "a readable file", describe(error)) from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
