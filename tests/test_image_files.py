"""Image files: what converts without surprise is converted, all else is refused in words."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from launch.artifacts import image_files
from launch.artifacts.artifact import ArtifactError

SHAPE = (4, 6, 3)  # h, w, c


def _save(path, array, **options):
    Image.fromarray(np.asarray(array)).save(path, **options)
    return str(path)


PIXELS = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
GREY = PIXELS[..., 0]


def _opaque(array):
    return np.concatenate([array, np.full((*SHAPE[:2], 1), 255, np.uint8)], -1)


def _palette(path):
    Image.fromarray(PIXELS // 128 * 255).quantize(8).save(path)


@pytest.mark.parametrize(
    ("name", "save", "channels", "expected"),
    [
        ("x.png", lambda p: _save(p, PIXELS), 3, PIXELS),
        ("x.bmp", lambda p: _save(p, PIXELS), 3, PIXELS),
        ("x.webp", lambda p: _save(p, PIXELS, lossless=True), 3, PIXELS),
        ("rgba.png", lambda p: _save(p, _opaque(PIXELS)), 3, PIXELS),
        ("gray.png", lambda p: _save(p, GREY), 3, np.repeat(GREY[..., None], 3, -1)),
        ("gray.png", lambda p: _save(p, GREY), 1, GREY[..., None]),
        ("la.png", lambda p: _save(p, _opaque(GREY[..., None])), 1, GREY[..., None]),
        ("bits.png", lambda p: _save(p, GREY > 99), 1, np.where(GREY > 99, 255, 0)[..., None]),
        ("palette.png", _palette, 3, PIXELS // 128 * 255),
        ("luma.png", lambda p: _save(p, PIXELS), 1, np.round(PIXELS @ [0.299, 0.587, 0.114])[..., None]),
    ],
)
def test_what_converts_without_surprise_is_converted(tmp_path, name, save, channels, expected):
    save(tmp_path / name)
    found = image_files.read([str(tmp_path / name)], (*SHAPE[:2], channels))
    assert (found.dtype, found.shape) == (np.uint8, (1, *SHAPE[:2], channels))
    np.testing.assert_allclose(found[0].astype(int), expected, atol=1 if name == "luma.png" else 0)


def test_a_photograph_is_turned_as_it_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    path = _save(tmp_path / "x.png", np.rot90(PIXELS), exif=exif)
    np.testing.assert_array_equal(image_files.read([path], SHAPE)[0], PIXELS)
    path = _save(tmp_path / "x.png", np.rot90(PIXELS))
    with pytest.raises(ArtifactError, match="has 4x6 pixels, and this network takes 6x4"):
        image_files.read([path], SHAPE)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(path, width, height, depth=8, color=2):
    """A PNG of zeros that need not be as large as it says."""
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    rows = zlib.compress(bytes(min(height, 9) * (1 + width % 10_000 * depth // 8 * (3 if color == 2 else 1))))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b""))


def _animation(path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _cut(path):
    _save(path, PIXELS)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "save", "words"),
    [
        ("none.png", lambda p: None, "no such file"),
        ("folder", lambda p: p.mkdir(), "no such file"),
        ("text.png", lambda p: p.write_text("no image"), "is not an intact image (PNG, JPEG, BMP, WEBP)"),
        ("x.eps", lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n"), "not an intact image"),
        ("x.gif", lambda p: _save(p, PIXELS), "not an intact image"),
        ("cut.png", _cut, "not an intact image"),
        (
            "large.png",
            lambda p: _save(p, np.zeros((8, 12, 3), np.uint8)),
            "has 12x8 pixels, and this network takes 6x4",
        ),
        ("rgb16.png", lambda p: _png(p, 6, 4, 16, 2), "neither gray nor RGB with 8 bits per channel"),
        ("gray16.png", lambda p: _png(p, 6, 4, 16, 0), "neither gray nor RGB with 8 bits per channel"),
        ("cmyk.jpg", lambda p: Image.new("CMYK", (6, 4)).save(p), "neither gray nor RGB"),
        ("glass.png", lambda p: Image.new("RGBA", (6, 4), (1, 2, 3, 128)).save(p), "has transparent pixels"),
        ("animation.png", _animation, "is an animation"),
        ("bomb.png", lambda p: _png(p, 50_000, 50_000), "has too many pixels"),
        ("small-bomb.png", lambda p: _png(p, 10_000, 10_000), "has too many pixels"),
    ],
)
def test_an_odd_image_is_named_and_what_is_odd(tmp_path, name, save, words):
    save(tmp_path / name)
    with pytest.raises(ArtifactError) as error:
        image_files.read([_save(tmp_path / "good.png", PIXELS), str(tmp_path / name)], SHAPE)
    assert str(error.value).startswith(f"{tmp_path / name} ") or "no such file" in words
    assert words in str(error.value)
