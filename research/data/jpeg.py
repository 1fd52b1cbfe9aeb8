"""Decodes the rows of a JPEG file that a crop needs, with simplejpeg (libjpeg-turbo).

Rows below the crop are skipped in all baseline files: told that the image is less high, the decoder stops early. Rows
above it are skipped in files with a restart marker after each row of blocks, which `research.data.resize` writes: the
bytes of the needed rows, between two markers, make a JPEG file of their own.
"""

import functools
import math
import re
import threading
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_BASELINE = (0xC0, 0xC1)  # frame headers of files whose rows are stored once, from top to bottom
_NON_FRAME_MARKERS = (0xC4, 0xC8, 0xCC)
_START_OF_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_END = b"\xff\xd9"
_MARGIN = 2  # rows decoded above and below, to interpolate the chroma of a crop's first and last rows


class Header(NamedTuple):
    """The header of a JPEG file.

    Attributes:
      frame: the position of the frame header.
      marker: the kind of frame.
      height, width, components: of the image.
      block_height: the rows of pixels that are stored together, 8 or 16 in most files.
      scan: the position of the pixels.
      row_restarts: whether a restart marker follows each row of blocks.
    """

    frame: int
    marker: int
    height: int
    width: int
    components: int
    block_height: int
    scan: int
    row_restarts: bool


class _Buffers(threading.local):
    """Memory that each thread uses again for every image: getting fresh pages for each takes a fifth of the time."""

    def __init__(self) -> None:
        self._encoded = bytearray()
        self._pixels = bytearray()

    def join(self, *parts: bytes | memoryview) -> memoryview:
        """Concatenates byte strings; the result may be changed, and is valid until the next call in this thread."""
        size = sum(map(len, parts))
        if len(self._encoded) < size:
            self._encoded = bytearray(2 * size)
        start = 0
        for part in parts:
            self._encoded[start : start + len(part)] = part
            start += len(part)
        return memoryview(self._encoded)[:size]

    def pixels(self, size: int) -> bytearray:
        """Returns a buffer of at least `size` bytes, which is valid until the next call in this thread."""
        if len(self._pixels) < size:
            self._pixels = bytearray(2 * size)
        return self._pixels


_buffers = _Buffers()


def is_available() -> bool:
    """Returns whether this module can decode."""
    return _simplejpeg() is not None


def read_header(encoded: bytes) -> Header | None:
    """Reads the header of a JPEG file; None if it is not a whole gray or RGB image, or too large."""
    if not encoded.startswith(b"\xff\xd8"):
        return None
    position, frame, interval = 2, 0, 0
    while position + 9 < len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # a marker may be preceded by any number of fill bytes
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NON_FRAME_MARKERS:
            frame = position
        elif marker == _RESTART_INTERVAL:
            interval = _uint16(encoded, position + 4)
        end = position + 2 + _uint16(encoded, position + 2)
        if marker == _START_OF_SCAN:
            header = _header(encoded, frame, position, end, interval) if frame else None
            return header if header and _is_supported(header, encoded) else None
        position = end
    return None


def _uint16(encoded: bytes, position: int) -> int:
    return int.from_bytes(encoded[position : position + 2], "big")


def _header(encoded: bytes, frame: int, scan_header: int, scan: int, interval: int) -> Header | None:
    height, width, components = _uint16(encoded, frame + 5), _uint16(encoded, frame + 7), encoded[frame + 9]
    sampling = encoded[frame + 11 : frame + 11 + 3 * components : 3]
    # A block of one component is 8 x 8 pixels, whatever its sampling factors.
    columns, rows = (max(x >> 4 for x in sampling), max(x & 15 for x in sampling)) if components > 1 else (1, 1)
    if not columns or not rows:
        return None
    has_one_scan = encoded[scan_header + 4] == components
    row_restarts = has_one_scan and interval > 0 and interval == -(-width // (8 * columns))
    return Header(frame, encoded[frame + 1], height, width, components, 8 * rows, scan, row_restarts)


def _is_supported(header: Header, encoded: bytes) -> bool:
    area = header.height * header.width
    # The decoder would fill what is missing of a truncated file with gray, so the marker of its end must be there.
    is_whole = encoded.rfind(_END) >= header.frame
    return is_whole and header.components in (1, 3) and 0 < area <= (Image.MAX_IMAGE_PIXELS or math.inf)


def decode_rows(encoded: bytes, header: Header, top: int, bottom: int, factor: int) -> tuple[np.ndarray, int] | None:
    """Decodes an image from row `top` to row `bottom`, and perhaps some rows above and below.

    Args:
      encoded: the JPEG file.
      header: its header.
      top, bottom: rows of the image, from 0; `bottom` is excluded.
      factor: by which the image is reduced in both directions: 1, 2, 4 or 8.

    Returns:
      uint8 [rows, width / factor, 3], and the row of the image at which it starts, a multiple of `factor`; valid until
      the next call in this thread. None if the decoder cannot decode the file.
    """
    start, end = max(0, top - _MARGIN * factor), min(header.height, bottom + _MARGIN * factor)
    start, data = _cut(encoded, header, start, end)
    height, width = end - start, header.width
    min_size = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
    buffer = _buffers.pixels(3 * height * width)
    try:
        # Not strict, since the decoder would complain about the rows left out.
        return _simplejpeg().decode_jpeg(data, "RGB", strict=False, buffer=buffer, **min_size), start
    except ValueError:
        return None


def _cut(encoded: bytes, header: Header, start: int, end: int) -> tuple[int, bytes | memoryview]:
    """Returns the first row, at most `start`, and a JPEG file of the image from there down to `end` or further."""
    if header.marker not in _BASELINE or (start, end) == (0, header.height):
        return 0, encoded
    markers = [match.start() for match in _RESTART.finditer(encoded, header.scan)] if header.row_restarts else []
    if markers and len(markers) == -(-header.height // header.block_height) - 1:
        first, last = start // header.block_height, -(-end // header.block_height)
        ends = [header.scan - 2, *markers, len(encoded)]
        begin = ends[first] + 2
        data = _buffers.join(encoded[: header.scan], encoded[begin : ends[last]], _END)
        # Restart markers are numbered from 0 to 7, in turn.
        for number, marker in enumerate(ends[first + 1 : last]):
            data[header.scan + marker - begin + 1] = 0xD0 + number % 8
        start = first * header.block_height
    else:
        start, data = 0, _buffers.join(encoded)
    data[header.frame + 5 : header.frame + 7] = (end - start).to_bytes(2, "big")
    return start, data


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:  # no wheel for this platform
        return None
    return simplejpeg
