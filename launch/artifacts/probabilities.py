"""The most likely classes of each image: as lines of text, and as a CSV file."""

import contextlib
import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from launch.artifacts.artifact import ArtifactError

Ranking = list[tuple[str, float]]  # (class, probability), the most likely class first

# Control characters, line separators, and the surrogates that stand for bytes that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Float64, over the last axis."""
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rank(logits: np.ndarray, classes: Sequence[str], count: int) -> Iterator[Ranking]:
    """Yields the `count` most likely classes of each row of `logits` [n, classes], by their softmax."""
    for row in softmax(logits):
        yield [(classes[int(i)], float(row[i])) for i in np.argsort(-row, kind="stable")[:count]]


def line(path: str, ranking: Ranking) -> str:
    """Returns a line of text for an image file, whose name may hold any bytes."""
    shown = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", path)
    return "  ".join([shown, *(f"{name} {probability:.3f}" for name, probability in ranking)])


class CsvTable:
    """Rows of a CSV file: `file,class_1,probability_1,class_2,probability_2,...`.

    Args:
      file: an open text file.
      count: the number of classes of each row.
    """

    def __init__(self, file: TextIO, count: int):
        self._writer = csv.writer(file, lineterminator="\n")
        ranks = range(1, count + 1)
        self._writer.writerow(["file", *(name for i in ranks for name in (f"class_{i}", f"probability_{i}"))])

    def add(self, path: str, ranking: Ranking) -> None:
        """Writes the row of an image file; probabilities have 6 significant digits."""
        self._writer.writerow([path, *(field for name, p in ranking for field in (name, f"{p:.6g}"))])


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A context that writes a new text file (UTF-8), which appears when the block ends without an error.

    Bytes of file names that are not UTF-8 are written as they are.

    Raises:
      ArtifactError: the file exists, or cannot be written (which is checked when the block is entered).
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.new"
    if path.exists() or path.is_symlink():
        raise ArtifactError(f"--csv={path} exists: give a new file, or remove it")
    try:
        with temporary.open("x", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as error:
        raise ArtifactError(f"--csv={path} cannot be written: {error.strerror}; give another file") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
