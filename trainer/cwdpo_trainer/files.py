"""Reading files with clear errors, and writing them atomically: to a temporary path that is then renamed.

What is written is on the disk (fsync) before it gets its name, so that a power failure leaves the old file or the new
one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from cwdpo_trainer.errors import InputError, describe, require, shorten

THREADS = min(8, os.cpu_count() or 1)  # that read files to hash them; hashing releases the interpreter's lock
_TEMPORARY = re.compile(r"\..+\.\d+(\.\w+)?")  # names that `replacing` gives
# torch.save raises a RuntimeError for a full disk, and names a line of this file instead of the cause.
_TORCH_WRITER = "inline_container.cc"
NESTED = "brackets that are nested too deeply"


def user_path(text: str | Path) -> Path:
    """The path that a user wrote, with `~` and `~name` replaced by home folders. An unknown name stays as it is."""
    try:
        return Path(os.path.expanduser(text))
    except ValueError:  # a null byte in the name: no such user
        return Path(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to. It replaces `path` if the block succeeds.

    A symbolic link stays, and the file that it points to is replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, because matplotlib and others derive the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`. It becomes `path`, which must not exist by then, if the block
    succeeds. Only one process may do this at a time."""
    temporary = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(path)
    flush(path.parent)


@contextlib.contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for `path`, which need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def remove_temporary_files(folder: Path) -> None:
    """Delete what `replacing` left in `folder` when a process was killed."""
    for path in folder.iterdir():
        if is_temporary(path):
            path.unlink()


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file that `replacing` has not finished."""
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


def flush(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Turn a failed write inside into an `InputError` about `path`. torch and safetensors have errors of their own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        is_write = error.errno is not None if isinstance(error, OSError) else _TORCH_WRITER in str(error)
        if not (is_write or isinstance(error, SafetensorError)):
            raise
        expected = f"free space and permission to write {what} (then run the same command again)"
        raise InputError(str(path), "", expected, describe(error)) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Sequence[Path]) -> list[str]:
    """`sha256` of each file, several at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(sha256, paths))


def read_text(path: Path, largest: int | None = None) -> str:
    """The text of a file. Raises `InputError` if it does not exist, has more than `largest` bytes, or cannot be read as
    UTF-8."""
    try:
        require(path.exists(), str(path), "", "", "no such file")
        require(path.is_file(), str(path), "", "a file", "a folder" if path.is_dir() else "a special file")
        size = path.stat().st_size
        require(largest is None or size <= largest, str(path), "", f"at most {largest} bytes", size)
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "", "UTF-8 text", describe(error)) from error
    except OSError as error:
        raise InputError(str(path), "", "a readable file", describe(error)) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `InputError` if it cannot be read or parsed."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(str(path), "", "valid JSON", NESTED) from error
    except ValueError as error:  # also of a number with thousands of digits
        raise InputError(str(path), "", "valid JSON", describe(error)) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `InputError` if it cannot be read or holds something else."""
    value = read_json(path)
    require(isinstance(value, dict), str(path), "", "a JSON object", type(value).__name__)
    return value


class RepeatedKey(ValueError):
    """A key is twice in a JSON object. Parsers keep one of the two values; which one differs."""

    EXPECTED = "each key once in an object"

    def __init__(self, key: str) -> None:
        super().__init__(f"{shorten(ascii(key))} more than once")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a JSON parser that raises `RepeatedKey`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        # A file name that is not UTF-8 has characters that UTF-8 cannot encode.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def check_writable_folder(path: Path, where: str, what: str) -> None:
    """Raise `InputError(where, what, ...)` unless files can be written to the folder `path`, which need not exist.

    It tries a file without a name, so nothing is left behind.
    """
    expected = "a folder that can be made and written to"
    try:
        existing = path.absolute()
        while not _exists(existing):
            existing = existing.parent
        if not existing.is_dir():
            kind = "a link to nothing" if not existing.exists() else "a file"
            raise InputError(where, what, expected, f"{str(path)!r} ({existing} is {kind})")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise InputError(where, what, expected, f"{str(path)!r} ({describe(error)})") from error


def check_writable_file(path: Path, where: str, what: str) -> None:
    """Raise `InputError(where, what, ...)` unless `path` can be written as a file; it and its folder need not exist."""
    real = Path(os.path.realpath(path))  # `replacing` follows links
    require(not (path.is_dir() or real.is_dir()), where, what, "a file", f"the folder {path}")
    # It would be replaced by a file: /dev/null for all other programs too.
    is_special = os.path.exists(path) and not os.path.isfile(path)
    require(not is_special, where, what, "a file", f"{path}, which is a special file")
    check_writable_folder(real.parent, where, what)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
