"""The images of rows: referenced when the rows are read, decoded (pixels.py) when a batch needs them.

A row's image is a file, a `data:` URI or a cell of a dataset. URLs are refused, because a run that downloads its images
is not repeatable and fails with the network.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from cwdpo_trainer import pixels
from cwdpo_trainer.errors import InputError, describe, require, shorten

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What an `ImageRef` raises about a file that is not an image, is damaged, or claims to be enormous.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageRef(ABC):
    """A reference to an encoded image. References with the same `key` are equal; messages call the image `name`."""

    name: str

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The encoded image (PNG, JPEG, ...)."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Identifies the image: references with the same key are the same image."""

    def name_from(self, folder: Path) -> str:
        """The name to use in a file in `folder`: a relative path for an image file."""
        return self.name

    def file(self) -> Path | BinaryIO:
        """What `PIL.Image.open` takes. Given a path, it reads the header alone until the pixels are needed."""
        return BytesIO(self.read_bytes())

    def load(self) -> Image.Image:
        """Decode the image as pixels.py says: RGB, or grayscale ("L") if it is that. Raises one of `IMAGE_ERRORS`."""
        with _decoding():
            return pixels.decode(self.file())

    def shape(self) -> tuple[str, tuple[int, int]]:
        """Mode ("RGB" or "L") and size (width, height) of what `load` returns, from the header alone if it says them.
        Raises one of `IMAGE_ERRORS`."""
        with _decoding():
            return pixels.shape_of(self.file())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageRef) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class FileImage(ImageRef):
    """An image file, identified by its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def read_bytes(self) -> bytes:
        return self.path.read_bytes()

    def file(self) -> Path:
        return self.path

    @property
    def key(self) -> str:
        return self.name

    def name_from(self, folder: Path) -> str:
        return os.path.relpath(self.path, folder)


class StoredImage(ImageRef):
    """An image inside a dataset or a row, identified by the SHA-256 of the bytes that `read` returns."""

    def __init__(self, name: str, read: Callable[[], bytes]) -> None:
        self.name = name
        self.read = read

    def read_bytes(self) -> bytes:
        return self.read()

    @cached_property
    def key(self) -> str:
        return "sha256:" + hashlib.sha256(self.read()).hexdigest()


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn what else Pillow raises about damaged files (EOFError, struct.error, ...) into a `ValueError`."""
    try:
        yield
    except IMAGE_ERRORS:
        raise
    except Exception as error:
        raise ValueError(f"damaged image ({describe(error)})") from error


def unreadable(where: str, image: ImageRef, error: Exception) -> InputError:
    """The error for an image of the row at `where` that raised one of `IMAGE_ERRORS`."""
    # Pillow names the address of an object in memory.
    problem = "not an image" if isinstance(error, UnidentifiedImageError) else describe(error)
    return InputError(where, "images", "readable image files", f"{image.name} ({problem})")


def image_refs(where: str, values: dict[str, Any], folder: Path) -> tuple[ImageRef, ...]:
    """The images of a row's column `image` or `images`. Relative paths start at `folder`."""
    require(not ("image" in values and "images" in values), where, "columns", "either image or images", "both")
    if "image" in values:
        image = values["image"]
        require(isinstance(image, (str, ImageRef)), where, "image", "a path or a data: URI", type(image).__name__)
    images = [values["image"]] if "image" in values else values.get("images", [])
    ok = isinstance(images, list) and all(isinstance(image, (str, ImageRef)) for image in images)
    require(ok, where, "images", "a list of paths or data: URIs", shorten(repr(images)))
    return tuple(
        image if isinstance(image, ImageRef) else _image_ref(where, f"{where} images[{index}]", image, folder)
        for index, image in enumerate(images)
    )


def _image_ref(where: str, name: str, text: str, folder: Path) -> ImageRef:
    if text.startswith("data:"):
        head, comma, payload = text.partition(",")
        ok = bool(comma) and head.endswith(";base64")
        require(ok, where, "images", "URIs of the form data:image/...;base64,...", repr(text[:40]))
        try:
            data = base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(where, "images", "valid base64", describe(error)) from error
        return StoredImage(name, partial(bytes, data))
    scheme = URL.match(text)
    expected = "paths, without file://" if text.lower().startswith("file:") else "local files (download them first)"
    require(scheme is None, where, "images", expected, shorten(text))
    path = folder / text
    # os.path.isfile is false, instead of raising, for names that are too long and folders that cannot be searched.
    require(os.path.isfile(path), where, "images", "an existing file or a data: URI", shorten(path))
    return FileImage(path)
