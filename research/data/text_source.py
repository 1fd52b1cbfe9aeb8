"""The interface of a text that is read block by block, and the fixed parts of a text that are held out."""

import abc
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from research.data import cache
from research.errors import UserError

Part = tuple[int, int]  # begin and end, in percent of a whole text

WHOLE: Part = (0, 100)
_BLOCK = 2**20  # bytes


class Text(abc.ABC):
    """The text of a split: bytes that are read in order, as often as needed, and never as a whole.

    Attributes:
      name: names it in messages.
      key: part of a file name, which changes whenever the text does.
      size: the approximate number of bytes; 0 if unknown.
    """

    name: str
    key: str
    size: int = 0

    @abc.abstractmethod
    def blocks(self, *, is_utf8: bool) -> Iterator[bytes]:
        """Yields consecutive pieces of the text, of a few megabytes at most.

        Args:
          is_utf8: whether text that is not UTF-8 is an error.

        Raises:
          UserError: the text cannot be read, or is none.
        """


def join(rows: Iterable[bytes]) -> Iterator[bytes]:
    """Joins the rows of a table with a newline between any two, and yields the text in blocks of about a megabyte."""
    block, is_first = bytearray(), True
    for row in rows:
        if not is_first:
            block += b"\n"
        block += row
        is_first = False
        if len(block) >= _BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def check_bytes(name: str, array: np.ndarray) -> None:
    """Raises `UserError` unless an array, of the text that `name` names, is uint8 with one axis."""
    if array.dtype != np.uint8 or array.ndim != 1:
        raise UserError(
            f"{name}: the feature text is {array.dtype}{list(array.shape)}, not bytes, uint8 [n]: convert it by "
            "np.frombuffer(text.encode(), np.uint8), or write token numbers to train.bin and val.bin for name=text"
        )


class ArrayText(Text):
    """A text in memory.

    Args:
      name: names it in messages.
      array: uint8 [number of bytes].

    Raises:
      UserError: the array is another.
    """

    def __init__(self, name: str, array: np.ndarray):
        check_bytes(name, array)
        self.name, self._array = name, array
        self.key = f"array-{cache.fingerprint({'text': array})}"
        self.size = len(array)

    def blocks(self, *, is_utf8: bool) -> Iterator[bytes]:
        """Yields it as one block."""
        del is_utf8
        yield self._array.tobytes()


Divisible = TypeVar("Divisible", bound="HasParts")


class HasParts(Protocol):
    """A text that can be split."""

    def part(self: Divisible, part: Part) -> Divisible:
        """Returns a part of the whole text."""
        ...


def hold_out(text: Divisible, *, validation: bool) -> dict[str, Divisible]:
    """Splits a text: its last 5% are test and, if wanted, the 5% before validation, the same for every seed.

    Args:
      text: the whole text.
      validation: whether to hold it out; otherwise it stays in train.
    """
    last = 90 if validation else 95
    parts = {"train": (0, last)} | ({"validation": (last, 95)} if validation else {}) | {"test": (95, 100)}
    return {role: text.part(part) for role, part in parts.items()}
