"""Rows of a JPEG file have the pixels of the whole image, and the bytes of other rows are not decoded."""

import io

import numpy as np
import photographs
import pytest
from PIL import Image

from research.data import jpeg

NOISE = np.random.default_rng(0).integers(0, 256, (163, 150, 3)).astype(np.uint8)
KINDS = {
    "420": {"subsampling": "4:2:0"},
    "422": {"subsampling": "4:2:2"},
    "444": {"subsampling": "4:4:4"},
    "gray": {"mode": "L"},
    "progressive": {"progressive": True},
}


def _encode(restart_rows=0, **options):
    return photographs.encode(NOISE, restart_marker_rows=restart_rows, **options)


def _rows(encoded, top, bottom, factor=1):
    header = jpeg.read_header(encoded)
    pixels, start = jpeg.decode_rows(encoded, header, top, bottom, factor)
    assert start % factor == 0
    assert start <= top
    return pixels[(top - start) // factor : (bottom - start) // factor].copy()


def _whole(encoded, factor=1):
    """The whole image, by Pillow."""
    image = Image.open(io.BytesIO(encoded))
    if factor > 1:
        image.draft(image.mode, (image.width // factor, image.height // factor))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("restart_rows", [0, 1, 2])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_rows_have_the_pixels_of_the_whole_image(options, restart_rows):
    encoded = _encode(restart_rows, **options)
    whole = _whole(encoded)
    for top in range(0, 163, 3):
        for height in (1, 16, 37, 80):
            bottom = min(163, top + height)
            np.testing.assert_array_equal(_rows(encoded, top, bottom), whole[top:bottom])


@pytest.mark.parametrize("restart_rows", [0, 1])
@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_rows_of_a_reduced_image(options, factor, restart_rows):
    encoded = _encode(restart_rows, **options)
    whole = _whole(encoded, factor)
    for top in range(0, 160, 8):
        bottom = min(160, top + 48)
        rows = _rows(encoded, top, bottom, factor)
        np.testing.assert_array_equal(rows, whole[top // factor : bottom // factor])


@pytest.mark.parametrize("options", [KINDS["420"], KINDS["444"], KINDS["gray"]], ids=["420", "444", "gray"])
def test_rows_above_and_below_are_not_decoded(options):
    encoded = bytearray(_encode(1, **options))
    whole = _whole(bytes(encoded))
    header = jpeg.read_header(encoded)
    assert header.row_restarts
    size = len(encoded) - header.scan
    for damaged in (slice(header.scan + 10, header.scan + size // 4), slice(-size // 4, -2)):
        other = encoded.copy()
        for place in range(*damaged.indices(len(other))):
            if other[place] < 0xD0 and other[place - 1] != 0xFF:  # markers are kept
                other[place] ^= 0x0F
        assert (_whole(bytes(other)) != whole).any()
        np.testing.assert_array_equal(_rows(bytes(other), 66, 98), whole[66:98])


def test_the_rows_below_are_skipped_in_files_without_restart_markers():
    header = jpeg.read_header(encoded := _encode())
    assert not header.row_restarts
    pixels, start = jpeg.decode_rows(encoded, header, 40, 60, 1)
    assert (start, len(pixels)) == (0, 62)


def test_a_file_that_lacks_a_restart_marker_is_decoded_from_its_beginning():
    encoded = _encode(1)
    header = jpeg.read_header(encoded)
    place = encoded.index(b"\xff\xd1", header.scan)
    pixels, start = jpeg.decode_rows(encoded[:place] + encoded[place + 2 :], header, 100, 120, 1)
    assert (start, len(pixels)) == (0, 122)


def test_restart_markers_at_other_places_are_not_taken_for_those_of_rows():
    # Three rows of ten blocks have two markers, both after each row and after each eleven blocks.
    encoded = photographs.encode(NOISE[:48], restart_marker_blocks=11, subsampling="4:2:0")
    assert not jpeg.read_header(encoded).row_restarts
    np.testing.assert_array_equal(_rows(encoded, 20, 40), _whole(encoded)[20:40])


def test_a_gray_image_with_sampling_factors_has_blocks_of_8_pixels():
    encoded = bytearray(_encode(1, mode="L"))
    encoded[jpeg.read_header(encoded).frame + 11] = 0x22
    assert jpeg.read_header(encoded).row_restarts
    np.testing.assert_array_equal(_rows(bytes(encoded), 100, 120), _whole(bytes(encoded))[100:120])


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-2], lambda x: x[:100], lambda x: b"", lambda x: b"\xff\xd8", lambda x: b"\x89PNG" + x]
)
def test_files_that_are_not_whole_have_no_header(damage):
    assert jpeg.read_header(_encode()) is not None
    assert jpeg.read_header(damage(_encode())) is None


@pytest.mark.parametrize("value", [0, 255])
def test_no_damage_of_the_header_raises(value):
    encoded = _encode(1)
    for place in range(2, jpeg.read_header(encoded).scan):
        damaged = encoded[:place] + bytes([value]) + encoded[place + 1 :]
        if header := jpeg.read_header(damaged):
            jpeg.decode_rows(damaged, header, header.height // 2, header.height // 2 + 1, 1)


def test_an_image_without_sampling_factors_is_left_to_pillow():
    encoded = bytearray(_encode())
    frame = jpeg.read_header(encoded).frame
    encoded[frame + 11 : frame + 20 : 3] = bytes(3)
    assert jpeg.read_header(bytes(encoded)) is None


def test_headers():
    header = jpeg.read_header(_encode(1, subsampling="4:2:0", comment=b"between"))
    assert (header.height, header.width, header.components, header.block_height) == (163, 150, 3, 16)
    assert header.row_restarts
    assert jpeg.read_header(_encode(subsampling="4:4:4")).block_height == 8
    assert jpeg.read_header(_encode(mode="CMYK")) is None
    # The components of some files are stored one after another.
    encoded = bytearray(_encode(1))
    encoded[encoded.index(b"\xff\xda") + 4] = 1
    assert not jpeg.read_header(bytes(encoded)).row_restarts
    # Any number of fill bytes may precede a marker.
    encoded = _encode()
    assert jpeg.read_header(encoded[:2] + b"\xff\xff" + encoded[2:]).height == 163
