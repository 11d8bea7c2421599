"""The images of rows: named when the rows are read, decoded when a batch needs them.

A row's image is the path of a file, a `data:` URI, or a cell of a data set. Addresses on the network are refused:
a run that reads its images from there cannot be repeated, and stops where the network does.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from cwdpo_trainer.errors import InputError, describe, require, shorten

# What Pillow raises on files that are no image, broken ones, and ones that claim to be enormous.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageRef(ABC):
    """An image that is not decoded yet. `name` is how messages call it; equal pictures are one image."""

    name: str

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The encoded file (PNG, JPEG, ...)."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What says whether two pictures are the same."""

    def name_from(self, folder: Path) -> str:
        """The name as a file in `folder` should give it."""
        return self.name

    def file(self) -> Path | BinaryIO:
        """What to open; a path lets Pillow read no more than the header where that is enough."""
        return BytesIO(self.read_bytes())

    def load(self) -> Image.Image:
        """The image as RGB, or gray as it is. Raises one of `IMAGE_ERRORS` where it cannot be read."""
        with Image.open(self.file()) as image:
            return image.convert("RGB") if image.mode not in ("RGB", "L") else image.copy()

    def shape(self) -> tuple[str, tuple[int, int]]:
        """The mode ("RGB" or "L") and size (width, height) that `load` gives, from the header alone."""
        with Image.open(self.file()) as image:
            return "L" if image.mode == "L" else "RGB", image.size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageRef) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class FileImage(ImageRef):
    """A file; its path says which image it is."""

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
    """Bytes that `read` finds, in a data set or a row itself; a digest of them says which image it is."""

    def __init__(self, name: str, read: Callable[[], bytes]) -> None:
        self.name = name
        self.read = read

    def read_bytes(self) -> bytes:
        return self.read()

    @cached_property
    def key(self) -> str:
        return "sha256:" + hashlib.sha256(self.read()).hexdigest()


def unreadable(where: str, picture: ImageRef, error: Exception) -> InputError:
    """The error for an image of the row at `where` that raised one of `IMAGE_ERRORS`."""
    return InputError(where, "images", "readable image files", f"{picture.name} ({describe(error)})")


def image_refs(where: str, values: dict[str, Any], folder: Path) -> tuple[ImageRef, ...]:
    """The pictures in the columns `image` or `images` of a row; relative paths start at `folder`."""
    require(not ("image" in values and "images" in values), where, "columns", "either image or images", "both")
    if "image" in values:
        image = values["image"]
        require(isinstance(image, (str, ImageRef)), where, "image", "a path or a data: URI", type(image).__name__)
    images = [values["image"]] if "image" in values else values.get("images", [])
    ok = isinstance(images, list) and all(isinstance(image, (str, ImageRef)) for image in images)
    require(ok, where, "images", "a list of paths or data: URIs", shorten(repr(images)))
    return tuple(
        image if isinstance(image, ImageRef) else _picture(where, f"{where} images[{place}]", image, folder)
        for place, image in enumerate(images)
    )


def _picture(where: str, name: str, text: str, folder: Path) -> ImageRef:
    if text.startswith("data:"):
        head, comma, payload = text.partition(",")
        ok = bool(comma) and head.endswith(";base64")
        require(ok, where, "images", "URIs of the form data:image/...;base64,...", repr(text[:40]))
        try:
            data = base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise InputError(where, "images", "valid base64", describe(error)) from error
        return StoredImage(name, partial(bytes, data))
    address = text.startswith(("http://", "https://"))
    require(not address, where, "images", "local files (download them first)", text)
    path = folder / text
    # A system cannot even look for a longer name; a picture's own bytes would be one.
    fits = all(len(part) <= 255 for part in path.parts)
    require(fits, where, "images", "file paths or data: URIs", f"{text[:60]!r}...")
    require(path.is_file(), where, "images", "an existing file", path)
    return FileImage(path)
