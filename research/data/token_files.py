"""Files of tokens in nanoGPT's format: uint16 numbers, little-endian, without a header; memory-mapped as they are."""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from research.data import cache
from research.data.cache import Arrays
from research.data.file_errors import reading
from research.data.text_source import WHOLE, Part
from research.errors import UserError

SUFFIX = ".bin"
_DTYPE = np.dtype("<u2")
_AT_ONCE = 2**24  # tokens


class TokenFile:
    """The tokens of a file, or a part of them.

    Args:
      path: the file.
      part: begin and end, in percent of the file.

    Raises:
      UserError: it is not readable, is empty, or has an odd number of bytes.
    """

    def __init__(self, path: Path, part: Part = WHOLE):
        self.path, self._part = path, part
        with reading(path):
            stat = path.stat()
        if not stat.st_size or stat.st_size % _DTYPE.itemsize:
            raise UserError(
                f"{path} has {stat.st_size:,} bytes: a file of tokens has two for each, uint16, as nanoGPT writes it"
            )
        self._stamp = stat.st_size, stat.st_mtime_ns

    def part(self, part: Part) -> "TokenFile":
        """Returns a part of the file."""
        return TokenFile(self.path, part)

    @property
    def largest(self) -> int:
        """The largest token of the whole file, which is read for it once."""
        digest = hashlib.sha256(os.fsencode(f"{self.path.absolute()} {self._stamp}")).hexdigest()[:16]
        return int(cache.load(f"largest-token-{digest}", lambda: _find_largest(self.path))["largest"][0])

    def tokens(self) -> np.ndarray:
        """Returns the tokens, a read-only memory map, uint16 [n]."""
        with reading(self.path):
            everything = np.memmap(self.path, _DTYPE, "r")
        begin, end = (len(everything) * percent // 100 for percent in self._part)
        return everything[begin:end]


def _find_largest(path: Path) -> Iterator[Arrays]:
    print(f"reading {path} once, for its largest token ...", file=sys.stderr, flush=True)
    largest = 0
    with reading(path), path.open("rb") as stream:
        while len(tokens := np.fromfile(stream, _DTYPE, _AT_ONCE)):
            largest = max(largest, int(tokens.max()))
    yield {"largest": np.array([largest])}
