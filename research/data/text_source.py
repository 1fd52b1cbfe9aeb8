"""The interface of a text that is read block by block, and the fixed parts of a text that are held out."""

import abc
from collections.abc import Iterator
from typing import Protocol, TypeVar

import numpy as np

from research.data import cache

Part = tuple[int, int]  # begin and end, in percent of a whole text

WHOLE: Part = (0, 100)


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


class ArrayText(Text):
    """A text in memory.

    Args:
      name: names it in messages.
      array: uint8 [number of bytes].
    """

    def __init__(self, name: str, array: np.ndarray):
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
