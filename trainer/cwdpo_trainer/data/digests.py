"""Digests of the images of a run's rows, so that a run does not resume with other ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cwdpo_trainer.data.images import IMAGE_ERRORS
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.files import THREADS

LENGTH = 16  # hexadecimal digits: 64 bits tell a run's images apart


def image_digests(rows: Sequence[Row]) -> dict[str, str]:
    """A digest of each row's images by the row's name ("train.jsonl:18"). Rows without images are left out.

    Reads every image once. One that cannot be read has a digest of its own: its row is left out of the run.
    """
    with_images = [row for row in rows if row.images]
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(threads.map(_named_digest, with_images))


def _named_digest(row: Row) -> tuple[str, str]:
    digest = hashlib.sha256()
    for image in row.images:
        try:
            digest.update(hashlib.sha256(image.read_bytes()).digest())
        except IMAGE_ERRORS:
            digest.update(b"unreadable")
    return Path(row.where).name, digest.hexdigest()[:LENGTH]
