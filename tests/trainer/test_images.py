"""Images are decoded as a viewer shows them, and their shapes are known without decoding."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageOps

from cwdpo_trainer import pixels
from cwdpo_trainer.data.images import IMAGE_ERRORS, FileImage, StoredImage
from cwdpo_trainer.data.rows import load_rows
from cwdpo_trainer.data.sources import open_source

ORIENTATION = 0x0112


def stored(data: bytes) -> StoredImage:
    return StoredImage("image", lambda: data)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(values: list, dtype: type) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, color: int, line: bytes, transparent: bytes) -> bytes:
    """A PNG file of one line, as Pillow cannot write it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"\0" + line)) + chunk(b"IEND", b"")
    )  # fmt: skip


def tagged(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def corners() -> Image.Image:
    """12 x 6 pixels, different in every pixel."""
    return Image.fromarray((np.arange(6 * 12 * 3).reshape(6, 12, 3) + 20).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_the_orientation_is_applied_once(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = stored(encoded(corners(), kind, exif=tagged(orientation), **options))
    flipped = {2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    expected = np.asarray(corners())
    columns, rows = flipped.get(orientation, (0, 0))
    expected = expected[:: -1 if rows else 1, :: -1 if columns else 1]
    expected = expected.transpose(1, 0, 2) if orientation in (5, 6, 7, 8) else expected
    loaded = image.load()
    assert np.array_equal(np.asarray(loaded), expected)
    assert image.shape() == (loaded.mode, loaded.size)
    assert ImageOps.exif_transpose(loaded).size == loaded.size  # some processors do this to their images


def test_a_photo_is_upright_on_every_way_in(tmp_path, monkeypatch):
    """As a file, as bytes in Parquet, and as an image of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "photo.jpg"
    corners().save(path, exif=tagged(6))
    (tmp_path / "parquet").mkdir()
    row = {"prompt": "<image> describe", "chosen": "a", "rejected": "b"}
    Dataset.from_list([{**row, "image": path.read_bytes()}]).to_parquet(tmp_path / "parquet" / "train.parquet")
    with Image.open(path) as opened:
        Dataset.from_list([{**row, "image": opened}]).save_to_disk(tmp_path / "set")
    rows = [load_rows(open_source(name, tmp_path))[0] for name in ("parquet", "set")]
    for image in (FileImage(path), *(row.images[0] for row in rows)):
        assert image.shape() == ("RGB", (6, 12))
        assert image.load().size == (6, 12)


def test_a_png_with_its_orientation_after_the_pixels(tmp_path):
    data = encoded(corners(), exif=tagged(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    for image in (FileImage(tmp_path / "late.png"), stored((tmp_path / "late.png").read_bytes())):
        assert image.shape() == ("RGB", (6, 12))
        assert image.load().size == (6, 12)


def test_damaged_exif_counts_as_upright():
    image = stored(encoded(corners(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff"))
    assert image.shape() == ("RGB", (12, 6)) == (image.load().mode, image.load().size)


PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT = 262, 258, 339


def with_tag(image: Image.Image, tag: int, value: int) -> bytes:
    """A TIFF file of `image` with a tag that Pillow does not let one set. Entries are: tag, type 3, count 1, value."""
    head, entry, tail = encoded(image, "TIFF").partition(struct.pack("<HHI", tag, 3, 1))
    assert entry
    return head + entry + struct.pack("<H", value) + tail[2:]


SCALED = {
    "16-bit PNG": (encoded(array([0, 128, 129, 257, 32768, 65535], np.uint16)), [0, 0, 1, 1, 128, 255]),
    "16-bit TIFF": (encoded(array([0, 257, 65535], np.uint16), "TIFF"), [0, 1, 255]),
    "16-bit PGM": (encoded(array([0, 257, 65535], np.uint16), "PPM"), [0, 1, 255]),
    "big-endian TIFF": (encoded(Image.frombytes("I;16B", (2, 1), b"\xff\xff\x01\x01"), "TIFF"), [255, 1]),
    "32-bit as 16-bit": (encoded(array([0, 257, 65535], np.int32), "TIFF"), [0, 1, 255]),
    "32-bit": (encoded(array([-100, 0, 100], np.int32), "TIFF"), [0, 128, 255]),
    "float in 0..1": (encoded(array([0, 0.25, 1], np.float32), "TIFF"), [0, 64, 255]),
    "float in 0..255": (encoded(array([0, 25, 100], np.float32), "TIFF"), [0, 25, 100]),
    "float in 0..1000": (encoded(array([0, 250, 1000], np.float32), "TIFF"), [0, 64, 255]),
    "float outside": (encoded(array([-3e38, 0, 3e38], np.float32), "TIFF"), [0, 128, 255]),
    "constant float": (encoded(array([7, 7], np.float32), "TIFF"), [7, 7]),
    "32-bit as 8-bit": (encoded(array([0, 128, 255], np.int32), "TIFF"), [0, 128, 255]),
    "unsigned 32-bit": (with_tag(array([0, -1], np.int32), SAMPLE_FORMAT, 1), [0, 255]),
    "16-bit with white as 0": (with_tag(array([0, 65535], np.uint16), PHOTOMETRIC, 0), [255, 0]),
    "12-bit": (with_tag(array([0xF0FF, 0], np.uint16), BITS_PER_SAMPLE, 12), [255, 0]),
    "bilevel": (encoded(array([0, 1], np.uint8).point(lambda value: 255 * value).convert("1")), [0, 255]),
    "16-bit with a transparent value": (encoded(array([0, 257, 258], np.uint16), transparency=257), [0, 255, 1]),
    "1-bit with a transparent value": (png(2, 1, 0, b"\x40", b"\0\0"), [255, 255]),
    "2-bit with a transparent value": (png(4, 2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
    "4-bit with a transparent value": (png(2, 4, 0, b"\x12", b"\0\1"), [255, 34]),
    "gray with alpha": (encoded(Image.merge("LA", [Image.new("L", (2, 1), 10), array([0, 255], np.uint8)])), [255, 10]),
}


@pytest.mark.parametrize("name", SCALED)
def test_gray_images_of_any_depth(name):
    data, expected = SCALED[name]
    loaded = stored(data).load()
    assert (loaded.mode, np.asarray(loaded).ravel().tolist()) == ("L", expected)
    assert stored(data).shape() == ("L", loaded.size)


def palette(**options) -> bytes:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    return encoded(image, **options)


CLEAR, HALF = (255, 255, 255), (132, 137, 142)  # (10, 20, 30) at no and at half opacity on white
COLORS = {
    "RGBA": (encoded(Image.new("RGBA", (2, 1), (10, 20, 30, 128))), [HALF, HALF]),
    "transparent WebP": (encoded(Image.new("RGBA", (2, 1), (10, 20, 30, 0)), "WEBP", lossless=True), [CLEAR, CLEAR]),
    "RGB with a transparent color": (encoded(Image.new("RGB", (2, 1), (9, 8, 7)), transparency=(9, 8, 7)), [CLEAR] * 2),
    "16-bit RGB with a transparent color": (png(2, 16, 2, b"\1\x2c" * 3 + b"\xff\xff\0\0\0\0", b"\1\x2c" * 3),
                                            [CLEAR, (255, 0, 0)]),
    "16-bit RGB close to a transparent color": (png(3, 16, 2, b"\1\x2c" * 3 + b"\1\x2c\1\x2c\1\x2d" + b"\1\x2d" * 3,
                                                    b"\1\x2d" * 3), [(1, 1, 1), (1, 1, 1), CLEAR]),
    "8-bit RGB with a transparent color": (png(2, 8, 2, b"\1\2\3\1\2\4", b"\0\1\0\2\0\3"), [CLEAR, (1, 2, 4)]),
    "palette": (palette(), [(10, 20, 30), (200, 0, 0)]),
    "palette with a transparent entry": (palette(transparency=0), [CLEAR, (200, 0, 0)]),
    "palette with alpha": (palette(transparency=b"\x80\xff"), [HALF, (200, 0, 0)]),
    "transparent GIF": (palette(kind="GIF", transparency=0), [CLEAR, (200, 0, 0)]),
    "PA": (encoded(Image.new("RGBA", (2, 1), (1, 2, 3, 0)).convert("PA"), "TIFF"), [CLEAR, CLEAR]),
    "CMYK": (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)] * 2),
    "icon": (encoded(Image.new("RGBA", (16, 16), (1, 2, 3, 0)), "ICO"), [CLEAR] * 256),
    "animation": (encoded(Image.new("RGB", (2, 1), "red"), "GIF", save_all=True,
                          append_images=[Image.new("RGB", (2, 1), "blue")]), [(255, 0, 0)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", COLORS)
def test_colors_are_composited_on_white(name):
    data, expected = COLORS[name]
    loaded = stored(data).load()
    assert (loaded.mode, list(map(tuple, np.asarray(loaded).reshape(-1, 3).tolist()))) == ("RGB", expected)
    assert stored(data).shape() == ("RGB", loaded.size)


NOISE = Image.effect_noise((64, 64), 90)
BROKEN = {
    "truncated PNG": (encoded(NOISE)[:2000], "truncated"),
    "truncated JPEG": (encoded(NOISE, "JPEG")[:1000], "truncated"),
    "truncated WebP": (encoded(NOISE.convert("RGB"), "WEBP")[:200], "decode"),
    "truncated GIF": (encoded(NOISE, "GIF")[:900], "truncated"),
    "text": (b"<html>not found</html>", "cannot identify"),
    "nothing": (b"", "cannot identify"),
    "NaN": (encoded(array([0, np.nan], np.float32), "TIFF"), "finite pixels"),
    "infinity": (encoded(array([0, np.inf], np.float32), "TIFF"), "finite pixels"),
    "thin": (encoded(Image.new("L", (2001, 2))), "at most 1000 : 1, got 2001 x 2"),
    "bomb": (png(1, 8, 0, b"\0", b"\0\0").replace(chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
             chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0))), "exceeds limit"),
    "program": (encoded(Image.new("L", (2, 2)), "EPS"), "EPS files are programs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_image_is_an_error_of_one_kind(name):
    data, message = BROKEN[name]
    with pytest.raises(IMAGE_ERRORS, match=message):
        stored(data).load()


def test_damage_raises_image_errors_alone():
    """Whatever byte is damaged. Other exceptions would escape the checks of rows."""
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(NOISE.convert("RGB").resize((16, 16)), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[generator.integers(0, min(len(whole), 300), size=3)] = generator.integers(0, 256, size=3)
            image = stored(damaged.tobytes())
            with contextlib.suppress(*IMAGE_ERRORS):
                assert image.shape() == (image.load().mode, image.load().size)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 pixel, got 0 x 3"):
        pixels._check(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("path", [".", "gone.png"])
def test_what_is_not_a_file_is_an_image_error(tmp_path: Path, path: str):
    with pytest.raises(IMAGE_ERRORS):
        FileImage(tmp_path / path).load()


def test_interlaced_16_bit_rgb_with_a_transparent_color():
    """Adam7, and filtered lines: the lower bytes come from the same pixels as the upper ones."""
    values = np.random.default_rng(0).integers(0, 2**16, (9, 7, 3), dtype=np.uint16)
    values[4, 2] = values[0, 0] ^ 1  # another color with the same upper bytes
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = []
    for top, left, down, right in passes:
        part = values[top::down, left::right].astype(">u2")
        for line in part if part.size else []:
            raw = line.tobytes()
            left_of = bytes(6) + raw[:-6]  # filter 1: the difference to the pixel on the left
            lines.append(b"\1" + bytes((a - b) % 256 for a, b in zip(raw, left_of, strict=True)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 9, 16, 2, 0, 0, 1))
    data = (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", values[0, 0].astype(">u2").tobytes())
        + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b"")
    )  # fmt: skip
    expected = (values >> 8).astype(np.uint8)
    expected[0, 0] = 255
    assert np.array_equal(np.asarray(stored(data).load()), expected)
