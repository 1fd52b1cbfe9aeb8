"""The text column of a split of a Hugging Face data set."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from research.data.hugging_face_files import reading
from research.data.text_source import WHOLE, Part, Text, join

if TYPE_CHECKING:
    import datasets

COLUMN = "text"
_ROWS_AT_ONCE = 32  # few, since a row may be a whole book; one by one takes several times as long


def is_string(feature: Any) -> bool:
    """Returns whether the values of a column with this feature are strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_text(features: Mapping[str, Any]) -> bool:
    """Returns whether a split has a column `text` of strings, and no images, marked as such or by their name."""
    import datasets

    has_images = any(isinstance(x, datasets.Image) or name in ("image", "img") for name, x in features.items())
    return not has_images and is_string(features.get(COLUMN))


class ColumnText(Text):
    """The text of a split: the rows of its column `text`, with a newline between any two.

    Args:
      name: names it in messages.
      dataset: the split.
      part: which part of the whole text, in whole rows.
    """

    def __init__(self, name: str, dataset: "datasets.Dataset", part: Part = WHOLE):
        self.name, self._set_name, self._dataset, self._part = f"hf:{name}", name, dataset, part
        column = dataset.data.column(COLUMN)
        # Offsets that point outside of the file would crash the process. This does not read the text.
        column.validate()
        begin, end = (len(column) * percent // 100 for percent in part)
        self._column = column.slice(begin, end - begin)
        self.key = self._hash()
        self.size = self._column.nbytes

    def _hash(self) -> str:
        """Hashes the lengths of the rows, a few rows (all if there are no files), and the state of the files."""
        import pyarrow.compute as pc

        digest = hashlib.sha256(repr((len(self._column), self._part)).encode())
        lengths = pc.call_function("binary_length", [self._column]).fill_null(-1).to_numpy()
        digest.update(lengths.astype(np.int64).tobytes())
        count = len(self._column)
        numbers = sorted({0, count // 2, count - 1}) if self._dataset.cache_files else range(count)
        for number in numbers if count else ():
            digest.update(self._column[number].as_buffer() or b"")
        for file in self._dataset.cache_files:
            stat = os.stat(file["filename"])
            digest.update(os.fsencode(f"{file['filename']} {stat.st_size} {stat.st_mtime_ns}\n"))
        return digest.hexdigest()[:16]

    def blocks(self, *, is_utf8: bool) -> Iterator[bytes]:
        """Yields the text in blocks of about a megabyte, or of a longer row."""
        del is_utf8  # strings always are
        with reading(self.name):
            yield from join(self._rows())

    def _rows(self) -> Iterator[bytes]:
        for chunk in self._column.chunks:
            for start in range(0, len(chunk), _ROWS_AT_ONCE):
                yield from ((row or "").encode() for row in chunk.slice(start, _ROWS_AT_ONCE).to_pylist())

    def part(self, part: Part) -> "ColumnText":
        """Returns a part of the whole text."""
        return ColumnText(self._set_name, self._dataset, part)
