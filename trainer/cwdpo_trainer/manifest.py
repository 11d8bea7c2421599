"""COMPLETE: the list of a folder's files with their sizes and SHA-256, written when all of them are on the disk.

    {"files": {"model.safetensors": {"size": 1234, "sha256": "9f86d0..."}, ...}}

A checkpoint or a saved model with this file is complete, and `verify` finds any damage since. README.md is not listed,
because the model card is written later and nothing is read from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.files import flush, read_json_object, sha256_of_all, write_json

COMPLETE = "COMPLETE"
_NOT_LISTED = {COMPLETE, "README.md"}


def seal(folder: Path) -> None:
    """Declare `folder` complete. One process calls this, once all processes have written their files.

    Costs a flush to the disk and one read of every file for its SHA-256 (docs/trainer.md has times).
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _NOT_LISTED]
    for path in {path.parent for path in paths} | {folder} | set(paths):
        flush(path)
    digests = sha256_of_all(paths)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    write_json(folder / COMPLETE, {"files": files})


def is_sealed(folder: Path) -> bool:
    """Whether all files of `folder` were written. `verify` tells whether they still are as they were."""
    return (folder / COMPLETE).is_file()


def verify(folder: Path) -> None:
    """Raise `InputError` about the first file in `folder` that is missing or is not as it was written."""
    listed = _listed(folder / COMPLETE)
    for name, entry in listed.items():  # before any file is read
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        found = "no such file" if size is None else f"{size} bytes"
        require(size == entry["size"], str(path), "", f"the {entry['size']} bytes that were saved", found)
    digests = sha256_of_all([folder / name for name in listed])
    for (name, entry), digest in zip(listed.items(), digests, strict=True):
        expected = f"the content that was saved (SHA-256 {entry['sha256'][:12]}...)"
        require(digest == entry["sha256"], str(folder / name), "", expected, f"another one ({digest[:12]}...)")


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    files = read_json_object(path).get("files")
    if not (isinstance(files, dict) and all(map(_is_entry, files.values()))):
        raise InputError(str(path), "files", "a size and a SHA-256 for each file", "something else")
    return files


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("size"), int) and isinstance(value.get("sha256"), str)
