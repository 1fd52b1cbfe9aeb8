"""Files of tokens in nanoGPT's format: uint16 numbers, little-endian, without a header; memory-mapped as they are."""

from pathlib import Path

import numpy as np

from research.data.file_errors import reading
from research.data.text_source import WHOLE, Part
from research.errors import UserError

SUFFIX = ".bin"
LONG = 2**30  # bytes
_DTYPE = np.dtype("<u2")
_AT_ONCE, _SAMPLES = 2**16, 64  # tokens that are read at once, and how often of a long file


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
        self._size = stat.st_size

    def part(self, part: Part) -> "TokenFile":
        """Returns a part of the file."""
        return TokenFile(self.path, part)

    @property
    def is_long(self) -> bool:
        """True if the file is too long to be read as a whole at every start."""
        return self._size > LONG

    def largest(self) -> int:
        """Returns the largest token of the file, or of a sample of a long one."""
        tokens = self.tokens()
        starts = np.linspace(0, len(tokens) - _AT_ONCE, _SAMPLES) if self.is_long else range(0, len(tokens), _AT_ONCE)
        return max(int(tokens[int(start) : int(start) + _AT_ONCE].max()) for start in starts)

    def tokens(self) -> np.ndarray:
        """Returns the tokens, a read-only memory map, uint16 [n].

        Raises:
          UserError: there are none in this part, or the file is not readable.
        """
        with reading(self.path):
            everything = np.memmap(self.path, _DTYPE, "r")
        begin, end = (len(everything) * percent // 100 for percent in self._part)
        if begin == end:
            raise UserError(
                f"{self.path} has only {len(everything)} tokens, too few to hold out 5% of them: use a longer file, or "
                "train.bin and val.bin"
            )
        return everything[begin:end]
