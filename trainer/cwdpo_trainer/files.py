"""Reading files with clear errors, and writing them atomically: to a temporary path that is then renamed."""

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
    """Yield a temporary path next to `path` to write to. It replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because matplotlib and others derive the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`. It becomes `path`, which must not exist by then, if the block
    succeeds."""
    temporary = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(path)


def read_text(path: Path) -> str:
    """The text of a file. Raises `InputError` if it does not exist or cannot be read as UTF-8."""
    try:
        require(path.exists(), str(path), "", "", "no such file")
        require(path.is_file(), str(path), "", "a file", "a folder" if path.is_dir() else "a special file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "", "UTF-8 text", describe(error)) from error
    except OSError as error:
        raise InputError(str(path), "", "a readable file", describe(error)) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `InputError` if it cannot be read or parsed."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(str(path), "", "valid JSON", error) from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
