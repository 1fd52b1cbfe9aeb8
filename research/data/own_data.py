"""Data that an experiment supplies itself: dictionaries of arrays, or grain data sources."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from research.data.cache import Arrays
from research.data.source import Source, as_feature
from research.dataset_config import DatasetConfig
from research.errors import UserError

_FINGERPRINTED = 3  # records


class RandomAccess(Protocol):
    """The part of the interface of grain's `RandomAccessDataSource` and `MapDataset` that is used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


Splits = Mapping[str, Mapping[str, Any] | RandomAccess]
Load = Callable[[DatasetConfig], tuple[tuple[str, ...], Splits]]


class _OwnSource(Source):
    """Records of a user's source; its fingerprint is a hash of the length and of three records."""

    has_name = False

    def __init__(self, records: RandomAccess):
        self._records = records
        digest = hashlib.sha256(str(len(records)).encode())
        for number in np.linspace(0, len(records) - 1, _FINGERPRINTED).astype(int) if len(records) else ():
            record = self[int(number)]
            for name, value in sorted(record.items()) if isinstance(record, Mapping) else ():
                digest.update(name.encode())
                digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self._records[number]


def load(name: str, load_own: Load, config: DatasetConfig) -> tuple[tuple[str, ...], dict[str, Arrays | Source]]:
    """Calls an experiment's function that supplies data, and checks what it returns.

    Args:
      name: the data set's name, for messages.
      load_own: returns the label names (() if there are no classes) and the splits by name. A split is a dictionary of
        arrays [n, ...], or has a length and records by number, each a dictionary of values: "image" may be the bytes of
        an image file, or uint8 [h, w, c] of any size.
      config: passed to `load_own`.

    Returns:
      The label names and the splits.

    Raises:
      UserError: `load_own` returns something else, or a split has no features, arrays of different lengths, or arrays
        of objects.
    """
    loaded = load_own(config)
    if not _is_named_splits(loaded):
        raise UserError(
            f"--config.dataset.name={name}: the function that loads it must return (label names, splits), as in "
            '("no", "yes"), {"train": {"image": ..., "label": ...}, "test": ...}; without classes, () for the names'
        )
    label_names, splits = loaded
    return tuple(label_names), {
        split: _checked(f"{name}, split {split}", examples) if isinstance(examples, Mapping) else _OwnSource(examples)
        for split, examples in splits.items()
    }


def _is_named_splits(loaded: Any) -> bool:
    if not (isinstance(loaded, tuple) and len(loaded) == 2 and isinstance(loaded[1], Mapping) and loaded[1]):
        return False
    names = loaded[0]
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def _checked(label: str, examples: Mapping[str, Any]) -> Arrays:
    arrays = {name: np.asarray(value) for name, value in examples.items()}
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not all(lengths.values()) or len(set(lengths.values())) != 1:
        raise UserError(f"{label}: every feature needs an array of the same number of examples, not {lengths}")
    return {name: as_feature(f"{label}: the feature {name}", array) for name, array in arrays.items()}
