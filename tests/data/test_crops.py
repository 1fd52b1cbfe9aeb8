"""Crops of encoded images are those of the decoded images, whatever is skipped to make them."""

import math

import numpy as np
import photographs
import pytest
from PIL import Image

from research.data import crops, decoding, jpeg

KINDS = {
    "420": {},
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "gray": {"mode": "L"},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "upright by EXIF": {"exif": photographs.rotated_exif(1)},
    **{f"orientation {number}": {"exif": photographs.rotated_exif(number)} for number in range(2, 10)},
    "CMYK": {"mode": "CMYK"},
    "PNG": {"kind": "PNG"},
    "palette": {"kind": "PNG", "mode": "P"},
    "WebP": {"kind": "WEBP", "lossless": True},
    "GIF": {"kind": "GIF"},
    "BMP": {"kind": "BMP"},
}


def _crop(image, box, size, channels=3):
    out = np.zeros((size, size, channels), np.uint8)
    seen = []

    def choose(height, width):
        seen.append((height, width))
        return crops.Box(*box)

    crops.crop(image, choose, out)
    return out, seen[0]


@pytest.mark.parametrize("libraries", ["all", "Pillow only"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_a_crop_that_is_not_resized_has_the_pixels_of_the_whole_image(options, libraries, monkeypatch):
    if libraries == "Pillow only":
        monkeypatch.setattr(jpeg, "is_available", lambda: False)
        monkeypatch.setattr(crops, "_opencv", lambda: None)
    encoded = photographs.encode(photographs.gradient(150, 203), **options)
    whole = decoding.decode(encoded, 3)
    for left, top in ((0, 0), (31, 5), (90, 17), (whole.shape[1] - 50, whole.shape[0] - 50)):
        found, size = _crop(encoded, (left, top, 50, 50), 50)
        assert size == whole.shape[:2]
        np.testing.assert_array_equal(found, whole[top : top + 50, left : left + 50])


def _ramps(height, width):
    """An image whose red is the column and whose green is the row, in gray levels."""
    assert max(height, width) <= 256
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full((height, width), 128)], -1).astype(np.uint8)


def _expected(start, length, size):
    """Returns the positions of the centers of `size` pixels that cover `length` pixels from `start`."""
    return start + (np.arange(size) + 0.5) * length / size - 0.5


@pytest.mark.parametrize("libraries", ["all", "Pillow only"])
@pytest.mark.parametrize(
    "options", [KINDS["444"], KINDS["progressive"], KINDS["PNG"]], ids=["444", "progressive", "PNG"]
)
@pytest.mark.parametrize("size", [20, 37, 64, 120])
def test_a_resized_crop_lies_where_the_box_does(options, size, libraries, monkeypatch):
    if libraries == "Pillow only":
        monkeypatch.setattr(jpeg, "is_available", lambda: False)
        monkeypatch.setattr(crops, "_opencv", lambda: None)
    encoded = photographs.encode(_ramps(200, 250), **({"quality": 100} | options))
    for left, top, width, height in ((0, 0, 250, 200), (10, 20, 170, 160), (101, 7, 90, 70)):
        found = _crop(encoded, (left, top, width, height), size)[0].astype(float)
        inner = slice(2, -2)  # at the border, filters are cut off
        tolerance = max(2.0, min(width, height) / size)  # a reduced image is cropped at whole pixels
        for channel, axis, start, length in ((0, 0, left, width), (1, 1, top, height)):
            means = found[..., channel].mean(axis)[inner]
            np.testing.assert_allclose(means, _expected(start, length, size)[inner], atol=tolerance)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_number_of_channels(channels):
    pixels = photographs.gradient(60, 80)
    for image in (photographs.encode(pixels, "PNG"), decoding.decode(photographs.encode(pixels, "PNG"), channels)):
        same, _ = _crop(image, (3, 4, 30, 30), 30, channels)
        np.testing.assert_array_equal(same, decoding.decode(photographs.encode(pixels, "PNG"), channels)[4:34, 3:33])
        smaller, _ = _crop(image, (3, 4, 30, 30), 10, channels)
        assert np.abs(smaller.mean((0, 1)) - same.mean((0, 1))).max() < 4


@pytest.mark.parametrize(
    "damage", [lambda x: x[: len(x) // 2], lambda x: x[:-2], lambda x: x[:300], lambda x: b"", lambda x: b"no image"]
)
def test_damaged_files_are_found_whatever_the_crop(damage):
    encoded = photographs.encode(photographs.gradient(150, 203))
    for box in ((0, 0, 50, 50), (100, 100, 50, 50)):
        with pytest.raises(decoding.ImageError):
            _crop(damage(encoded), box, 50)


def test_rotation_in_xmp_data_is_applied():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    encoded = photographs.encode(photographs.gradient(40, 80), xmp=xmp)
    whole = decoding.decode(encoded, 3)
    found, size = _crop(encoded, (3, 30, 20, 20), 20)
    assert size == whole.shape[:2] == (80, 40)
    np.testing.assert_array_equal(found, whole[30:50, 3:23])


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(decoding.ImageError, match="more than 1,000 pixels"):
            _crop(photographs.encode(photographs.gradient(40, 60), kind), (0, 0, 20, 20), 20)


def test_random_resized_boxes_have_the_published_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([crops.random_resized(1000, 1000, rng, 0.08) for _ in range(4000)], float)
    left, top, width, height = boxes.T
    areas, log_ratios = width * height / 1e6, np.log(width / height)
    assert areas.min() > 0.079
    assert areas.max() <= 1
    assert np.abs(log_ratios).max() < math.log(4 / 3) + 0.01
    # A box of less than 3/4 of the area always fits, so there both are uniform and independent.
    small = areas < 0.75
    for values, low, high in ((areas[small], 0.08, 0.75), (log_ratios[small], -math.log(4 / 3), math.log(4 / 3))):
        quantiles = np.quantile(values, [0.1, 0.3, 0.5, 0.7, 0.9])
        np.testing.assert_allclose(quantiles, low + (high - low) * np.array([0.1, 0.3, 0.5, 0.7, 0.9]), atol=0.03)
    for start, side in ((left, width), (top, height)):
        assert (start >= 0).all()
        assert (start + side <= 1000).all()
        places = start[small] / (1001 - side[small])
        np.testing.assert_allclose(np.quantile(places, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_images_in_which_no_random_box_fits_are_cropped_at_the_center():
    rng = np.random.default_rng(0)
    assert crops.random_resized(10, 1000, rng, 1.0) == crops.Box(493, 0, 13, 10)
    assert crops.random_resized(1000, 10, rng, 1.0) == crops.Box(0, 493, 10, 13)
    assert crops.random_resized(1, 1, rng, 0.08) == crops.Box(0, 0, 1, 1)


def test_random_squares_cover_the_shorter_side():
    rng = np.random.default_rng(0)
    boxes = [crops.random_square(20, 50, rng) for _ in range(300)]
    assert {box[1:] for box in boxes} == {(0, 20, 20)}
    assert {box.left for box in boxes} == set(range(31))


@pytest.mark.parametrize(("height", "width"), [(190, 160), (160, 190), (160, 160), (161, 197)])
@pytest.mark.parametrize("fraction", [0.875, 1.0])
def test_evaluation_resizes_the_shorter_side_and_takes_the_center(height, width, fraction):
    pixels = _ramps(height, width)
    found = decoding.decode_center(photographs.encode(pixels, "PNG"), 3, 32, fraction).astype(float)
    side = min(height, width) * fraction
    for channel, axis, length in ((0, 0, width), (1, 1, height)):
        expected = _expected((length - side) / 2, side, 32)
        np.testing.assert_allclose(found[..., channel].mean(axis)[2:-2], expected[2:-2], atol=0.51)


def test_evaluation_leaves_squares_of_the_right_size_as_they_are():
    pixels = photographs.gradient(60, 60)
    np.testing.assert_array_equal(decoding.decode_center(photographs.encode(pixels, "PNG"), 3, 60, 1.0), pixels)
    np.testing.assert_array_equal(decoding.decode_center(pixels, 3, 60, 1.0), pixels)
