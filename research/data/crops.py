"""Cuts random crops out of encoded images for training, and resizes them.

The size of an image is read first and the crop drawn; then only what the crop needs is decoded. JPEG files are decoded
by simplejpeg (libjpeg-turbo) and resized by OpenCV; other files, and all files where these two are not installed, are
decoded by `research.data.decoding` and resized by Pillow. Evaluation uses `decoding.decode_center` everywhere.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from research.data import decoding

_RATIO = 3 / 4, 4 / 3  # of width to height: Szegedy et al. 2015, section 6
_ATTEMPTS = 10
_MARGIN = 32  # rows decoded below a crop: chroma of the last rows is interpolated, in blocks of 16
_BASELINE = (0xC0, 0xC1)  # frame headers of JPEG files whose rows are stored once, from top to bottom
_NON_FRAME_MARKERS = (0xC4, 0xC8, 0xCC)
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


class _Buffers(threading.local):
    """Memory that each thread uses again for every image: getting fresh pages for each takes a fifth of the time."""

    def __init__(self) -> None:
        self._encoded = bytearray()
        self._pixels = bytearray()

    def copy(self, data: bytes) -> memoryview:
        """Returns a copy of `data` that may be changed, and is valid until the next call in this thread."""
        if len(self._encoded) < len(data):
            self._encoded = bytearray(2 * len(data))
        view = memoryview(self._encoded)[: len(data)]
        view[:] = data
        return view

    def pixels(self, size: int) -> bytearray:
        """Returns a buffer of at least `size` bytes, which is valid until the next call in this thread."""
        if len(self._pixels) < size:
            self._pixels = bytearray(2 * size)
        return self._pixels


_buffers = _Buffers()


class _Frame(NamedTuple):
    """The frame header of a JPEG file: its marker and position, and the size of the image."""

    marker: int
    position: int
    height: int
    width: int
    components: int


def _jpeg_region(encoded: bytes, choose: Choose, size: int) -> np.ndarray | None:
    """Decodes the crop of a JPEG file, perhaps reduced but not below `size`; None if the file is of another kind.

    Two things are skipped: rows below the crop, and the resolution that a crop of twice the size or more does not need
    (the decoder scales by 1/2, 1/4 or 1/8). The result is valid until the next call in this thread.
    """
    frame = _frame(encoded) if encoded.startswith(b"\xff\xd8") else None
    if frame is None or _simplejpeg() is None or not _is_supported(frame, encoded):
        return None
    _, position, height, width, _ = frame
    may_be_rotated = any(name in encoded[:position] for name in (b"Exif\0", b"ns.adobe.com/xap"))
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
    if (region := _decode_box(encoded, frame, box, factor)) is None or orientation == 1:
        return region
    region = region[:: -1 if flipped_rows else 1, :: -1 if flipped_columns else 1]
    return np.ascontiguousarray(region.transpose(1, 0, 2) if transposed else region)


def _is_supported(frame: _Frame, encoded: bytes) -> bool:
    """Returns whether the file is a whole gray or RGB image that is not too large."""
    area = frame.height * frame.width
    # The decoder would fill what is missing of a truncated file with gray, so the marker of its end must be there.
    is_whole = encoded.rfind(b"\xff\xd9") >= frame.position
    return is_whole and frame.components in (1, 3) and 0 < area <= (Image.MAX_IMAGE_PIXELS or math.inf)


def _decode_box(encoded: bytes, frame: _Frame, box: Box, factor: int) -> np.ndarray | None:
    """Decodes a box of a JPEG file, reduced by a factor of 1, 2, 4 or 8; None if the decoder cannot."""
    marker, position, height, width, _ = frame
    data: bytes | memoryview = encoded
    bottom = box.top + box.height + _MARGIN * factor
    if marker in _BASELINE and bottom < height:
        # The rows of a baseline file follow each other: told that the image ends here, the decoder stops here.
        height = bottom
        data = _buffers.copy(encoded)
        data[position + 5 : position + 7] = height.to_bytes(2, "big")
    min_size = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
    buffer = _buffers.pixels(3 * height * width)
    try:
        # Not strict, since the decoder would complain about the rows left out.
        pixels = _simplejpeg().decode_jpeg(data, "RGB", strict=False, buffer=buffer, **min_size)
    except ValueError:  # Pillow decides whether it is damaged
        return None
    scale = len(pixels) / height  # 1 / factor, up to rounding
    top, left = round(box.top * scale), round(box.left * scale)
    return pixels[top : top + max(1, round(box.height * scale)), left : left + max(1, round(box.width * scale))]


def _frame(encoded: bytes) -> _Frame | None:
    """Finds the frame header of a JPEG file."""
    position = 2
    while position + 9 < len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NON_FRAME_MARKERS:
            height, width = (int.from_bytes(encoded[position + i : position + i + 2], "big") for i in (5, 7))
            return _Frame(marker, position, height, width, encoded[position + 9])
        # A marker may be preceded by any number of fill bytes.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def decoder() -> str:
    """Names what crops are made with: their pixels differ a little."""
    return "libjpeg" if _simplejpeg() and _opencv() else "pillow"


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:  # no wheel for this platform
        return None
    return simplejpeg


@functools.cache
def _opencv() -> Any:
    try:
        import cv2
    except ImportError:  # no wheel for this platform
        return None
    cv2.setNumThreads(1)  # the images of a batch are spread over threads already
    return cv2
