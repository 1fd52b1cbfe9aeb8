"""Cuts random crops out of encoded images for training, and resizes them.

The size of an image is read first and the crop drawn; then only what the crop needs is decoded. JPEG files are decoded
by `research.data.jpeg` and resized by OpenCV; other files, and all files where simplejpeg and OpenCV are not installed,
are decoded by `research.data.decoding` and resized by Pillow. Evaluation uses `decoding.decode_center` everywhere.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from research.data import decoding, jpeg

_RATIO = 3 / 4, 4 / 3  # of width to height: Szegedy et al. 2015, section 6
_ATTEMPTS = 10
# How the upright image is made, by EXIF orientation: (axes exchanged after the others, rows and columns reversed).
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class Box(NamedTuple):
    """A rectangle of pixels."""

    left: int
    top: int
    width: int
    height: int


Choose = Callable[[int, int], Box]  # from an image's height and width


def random_resized(height: int, width: int, rng: np.random.Generator, min_area: float) -> Box:
    """Draws a box of random area and aspect ratio (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    The area is uniform between `min_area` and 1 times the image's, the logarithm of width / height uniform between
    those of 3/4 and 4/3. The first of ten attempts that fits in the image is used; if none does, the largest centered
    box whose aspect ratio is in this range.
    """
    log_low, log_high = map(math.log, _RATIO)
    # In plain Python: for so few numbers it is several times as fast as NumPy.
    for area, log_ratio, left, top in rng.random((_ATTEMPTS, 4)).tolist():
        area = height * width * (min_area + (1 - min_area) * area)
        ratio = math.exp(log_low + (log_high - log_low) * log_ratio)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            return Box(int(left * (width - box_width + 1)), int(top * (height - box_height + 1)), box_width, box_height)
    box_width = min(width, max(1, round(height * _RATIO[1])))
    box_height = min(height, max(1, round(width / _RATIO[0])))
    return Box((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)


def random_square(height: int, width: int, rng: np.random.Generator) -> Box:
    """Draws the position of the largest square in an image: the crop after its shorter side was resized."""
    side = min(height, width)
    left, top = rng.random(2) * (width - side + 1, height - side + 1)
    return Box(int(left), int(top), side, side)


def crop(image: bytes | np.ndarray, choose: Choose, out: np.ndarray) -> None:
    """Writes a crop of an image into `out`.

    Args:
      image: an encoded image file, or uint8 [h, w, c].
      choose: returns the crop for an image of some height and width.
      out: uint8 [size, size, c], contiguous; the crop is resized to it.

    Raises:
      decoding.ImageError: the image is damaged, or larger than `decoding` allows.
    """
    channels = out.shape[-1]
    region = _jpeg_region(image, choose, len(out)) if isinstance(image, bytes) and channels == 3 else None
    if region is None:
        pixels = decoding.decode(image, channels) if isinstance(image, bytes) else image
        box = choose(*pixels.shape[:2])
        region = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    _resize(region, out)


def _resize(region: np.ndarray, out: np.ndarray) -> None:
    """Resizes bilinearly; when it shrinks to less than half, by the mean of each pixel's area."""
    height, width, channels = region.shape
    if (height, width) == out.shape[:2]:
        out[...] = region
    elif (cv2 := _opencv()) and channels != 2:
        shrinks = min(height, width) >= 2 * len(out)
        flat = out[..., 0] if channels == 1 else out
        cv2.resize(region, out.shape[1::-1], dst=flat, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    else:
        flat = Image.fromarray(region[..., 0] if channels == 1 else region)
        out[...] = np.asarray(flat.resize(out.shape[1::-1], Image.Resampling.BILINEAR)).reshape(out.shape)


def _jpeg_region(encoded: bytes, choose: Choose, size: int) -> np.ndarray | None:
    """Decodes the crop of a JPEG file, perhaps reduced but not below `size`; None if `jpeg` cannot.

    A crop of twice the size or more is decoded at 1/2, 1/4 or 1/8 of the resolution. The result is valid until the next
    call in this thread.
    """
    header = jpeg.read_header(encoded) if jpeg.is_available() else None
    if header is None:
        return None
    height, width = header.height, header.width
    may_be_rotated = any(name in encoded[: header.scan] for name in (b"Exif\0", b"ns.adobe.com/xap"))
    orientation = decoding.orientation(encoded) if may_be_rotated else 1
    transposed, flipped_rows, flipped_columns = _ORIENTATIONS.get(orientation, _ORIENTATIONS[1])
    box = choose(width, height) if transposed else choose(height, width)
    if transposed:
        box = Box(box.top, box.left, box.height, box.width)
    if flipped_columns:
        box = box._replace(left=width - box.left - box.width)
    if flipped_rows:
        box = box._replace(top=height - box.top - box.height)
    factor = next((f for f in (8, 4, 2) if min(box.width, box.height) >= f * size), 1)
    if (decoded := jpeg.decode_rows(encoded, header, box.top, box.top + box.height, factor)) is None:
        return None  # Pillow decides whether it is damaged
    pixels, start = decoded
    left, top, box_width, box_height = (round(x / factor) for x in box._replace(top=box.top - start))
    region = pixels[top : top + box_height, left : left + box_width]
    if orientation == 1:
        return region
    region = region[:: -1 if flipped_rows else 1, :: -1 if flipped_columns else 1]
    return np.ascontiguousarray(region.transpose(1, 0, 2) if transposed else region)


def decoder() -> str:
    """Names what crops are made with: their pixels differ a little."""
    return "libjpeg" if jpeg.is_available() and _opencv() else "pillow"


@functools.cache
def _opencv() -> Any:
    try:
        import cv2
    except ImportError:  # no wheel for this platform
        return None
    cv2.setNumThreads(1)  # the images of a batch are spread over threads already
    return cv2
