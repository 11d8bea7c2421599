"""Encoded images as 8-bit RGB or grayscale, as a viewer shows them.

- Orientation: EXIF (or XMP) is applied. An orientation that is damaged or unknown counts as upright.
- Transparency (alpha channels, transparent palette entries and colors): composited on white.
- 16 bits per channel: scaled from the full range, so that 0 to 65535 becomes 0 to 255; 12 bits likewise.
- 32-bit integers: as they are if all values are in 0..255, as 16 bits if all are in 0..65535, else from their own
  minimum and maximum.
- Floats: from 0..1 if all values are in it, as they are if all are in 0..255, else from their own minimum and maximum.
  NaN and infinity are refused.
- CMYK and other color spaces: converted to RGB. Bilevel images become grayscale.
- Animations: the first frame.
- Size: at least 1 pixel, at most 2 * `PIL.Image.MAX_IMAGE_PIXELS` (Pillow's limit), and sides of at most
  `LARGEST_ASPECT` : 1. A thinner image becomes enormous in processors that scale the shorter side.
- EPS is refused: Pillow runs Ghostscript to read it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

VERSION = 3  # of what `decode` returns: log-probs in a reference cache are those of one version
LARGEST_ASPECT = 1000
# Pillow knows their size and mode before it decodes them. Other formats (ICO, ICNS) may say something else.
EXACT_HEADERS = {"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
GRAY = {"1", "L", "LA", "La", "I", "F"}  # and I;16 in its byte orders
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)
SAMPLE_FORMAT, UNSIGNED = 339, 1  # a tag of TIFF, and its default
# The factor from a transparent sample in a PNG file to Pillow's 8 bits, by Pillow's name of the stored format.
SAMPLE_SCALE = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}
# Pillow's names of 16-bit RGB. PNG files are big-endian, of which the second one unpacks the lower bytes.
HIGH_BYTES, LOW_BYTES = "RGB;16B", "RGB;16L"
METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG file that may hold an orientation

Size = tuple[int, int]


def decode(file: Path | BinaryIO) -> Image.Image:
    """The image of mode "RGB", or "L" if it is gray, without metadata.

    Raises `OSError`, `ValueError` or another exception of Pillow about what is no image, is damaged or has no pixels.
    """
    with Image.open(file) as image:
        _check(image)
        stored = _stored_format(image)
        image.load()
        orientation = _orientation(image)  # after load: Pillow turns TIFF itself, and PNG may have it at its end
        upright = UPRIGHT.get(orientation)
        low_bytes = _low_bytes(file) if _is_deep_transparent(image, stored) else None
        plain = _plain(image, stored, low_bytes)
        turned = plain if upright is None else plain.transpose(upright)
    turned.info = {}  # or a processor would apply the orientation once more
    return turned


def shape_of(file: Path | BinaryIO) -> tuple[str, Size]:
    """Mode and size of what `decode` returns. Common formats are not decoded: their headers say it."""
    with Image.open(file) as image:
        _check(image)
        if image.format in EXACT_HEADERS and not (image.format == "PNG" and _has_metadata_after_pixels(file)):
            return "L" if _is_gray(image.mode) else "RGB", _upright_size(image)
    decoded = decode(file)
    return decoded.mode, decoded.size


def _check(image: Image.Image) -> None:
    """Raise `ValueError` unless the header describes an image of the sizes and formats above."""
    width, height = image.size
    if image.format == "EPS":
        raise ValueError("EPS files are programs; convert them to PNG")
    if min(image.size) < 1:
        raise ValueError(f"expected at least 1 pixel, got {width} x {height}")
    if max(image.size) > LARGEST_ASPECT * min(image.size):
        raise ValueError(f"expected sides of at most {LARGEST_ASPECT} : 1, got {width} x {height} pixels")


def _is_gray(mode: str) -> bool:
    return mode in GRAY or mode.startswith("I;16")


def _upright_size(image: Image.Image) -> Size:
    width, height = image.size
    if image.format == "TIFF":  # versions of Pillow differ in whether `size` is upright before the image is decoded
        tags = _tiff_tags(image)
        width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
        orientation = tags.get(ExifTags.Base.Orientation, 1)
    else:
        orientation = _orientation(image)
    return (height, width) if orientation in SWAPS_SIDES else (width, height)


def _orientation(image: Image.Image) -> Any:
    try:
        # Not the method of PngImageFile, which decodes an image without EXIF.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises all kinds; a viewer shows such an image as it is stored
        return 1


def _has_metadata_after_pixels(file: Path | BinaryIO) -> bool:
    """Whether a PNG file has text or EXIF after its pixels. Reads the headers of its chunks."""
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as stream:
        stream.seek(8)
        seen_pixels = False
        while len(header := stream.read(8)) == 8:
            seen_pixels = seen_pixels or header[4:] == b"IDAT"
            if seen_pixels and header[4:] in METADATA:
                return True
            stream.seek(int.from_bytes(header[:4], "big") + 4, 1)  # content and checksum
    return False


def _stored_format(image: Image.Image) -> str:
    """Pillow's name for how the pixels are stored, such as "RGB;16B". Known until the image is decoded."""
    tile: Any = getattr(image, "tile", None)
    stored = tile[0][3] if tile else ""
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    return stored if isinstance(stored, str) else ""


def _is_deep_transparent(image: Image.Image, stored: str) -> bool:
    """Whether this is a PNG file of 16-bit RGB with a transparent color."""
    return image.format == "PNG" and stored == HIGH_BYTES and isinstance(image.info.get("transparency"), tuple)


def _low_bytes(file: Path | BinaryIO) -> np.ndarray:
    """The lower 8 of the 16 bits per channel of a PNG file, which Pillow drops: its unpacker for the other byte order
    keeps them instead of the upper ones."""
    if not isinstance(file, Path):
        file.seek(0)
    with Image.open(file) as image:
        image.tile = [tile._replace(args=LOW_BYTES) for tile in image.tile]
        image.load()
        return np.asarray(image)


def _plain(image: Image.Image, stored: str, low_bytes: np.ndarray | None) -> Image.Image:
    """A decoded image as opaque 8-bit RGB or gray. `low_bytes`: what `image` lacks of 16-bit RGB."""
    mode = "L" if _is_gray(image.mode) else "RGB"
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values, top = _stored_values(image)
        scaled = _eight_bits(values, top, image.info.get("transparency"))
        return Image.fromarray(255 - scaled if _is_white_zero(image) else scaled)
    if low_bytes is not None:
        high_bytes = np.array(image)
        color = np.array(image.info["transparency"])
        transparent = ((high_bytes == color >> 8) & (low_bytes == (color & 0xFF))).all(2)
        high_bytes[transparent] = 255
        return Image.fromarray(high_bytes)
    if not image.has_transparency_data:
        return image.convert(mode)  # a copy, if it has this mode already
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode in ("1", "L", "RGB"):
        image = _with_transparent_color(image, stored)
    visible = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible).convert(mode)


def _tiff_tags(image: Image.Image) -> Any:
    """The tags of a TIFF image by number; empty for other formats."""
    return getattr(image, "tag_v2", {})


def _stored_values(image: Image.Image) -> tuple[np.ndarray, float]:
    """The pixels of a 16-bit, 32-bit or float image as the file has them, and the largest value that they may have (0:
    it depends on the pixels)."""
    values = np.asarray(image)
    tags = _tiff_tags(image)
    if image.mode == "I" and tags and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        values = values.view(np.uint32)  # Pillow has signed integers only
    if image.mode.startswith("I;16"):
        return values, 2.0 ** max(tags.get(ExifTags.Base.BitsPerSample, (16,))[0], 9) - 1
    return values, 0.0


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF image stores white as 0. Pillow turns those of 8 bits or less."""
    return _tiff_tags(image).get(ExifTags.Base.PhotometricInterpretation) == 0


def _eight_bits(values: np.ndarray, top: float, transparent: Any) -> np.ndarray:
    """Scale values up to `top` (0: the range that holds them all) to 0..255. Those equal to `transparent` become
    white."""
    exact = values.astype(np.float64)
    low, high = exact.min(), exact.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("expected finite pixels, got NaN or infinity")
    ranges = (top,) if top else (1.0, 255.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    fitting = [limit for limit in ranges if low >= 0 and high <= limit]
    if not fitting:
        exact -= low
    top = fitting[0] if fitting else high - low or 1.0
    scaled = np.floor(exact * 255 / top + 0.5).astype(np.uint8)
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return scaled


def _with_transparent_color(image: Image.Image, stored: str) -> Image.Image:
    """The image with its transparent color in the 8 bits of Pillow's pixels. PNG writes it in those of the file."""
    color = image.info["transparency"]
    if isinstance(color, int):
        color *= SAMPLE_SCALE.get(stored, 1)
    image = image.convert("L") if image.mode == "1" else image.copy()
    image.info["transparency"] = color
    return image
