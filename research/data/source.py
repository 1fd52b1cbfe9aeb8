"""The interface of a data source: a number of records, which are read one by one when they are needed.

Every split that is too large or too irregular for arrays is a `Source`: image folders, prepared TFDS sets that are not
decoded in advance, Hugging Face sets, and sources that an experiment supplies.
"""

import abc
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from research.errors import UserError

_AS_ON_DEVICE = {"float64": np.float32, "int64": np.int32, "uint64": np.uint32}


class DamagedError(Exception):
    """A record cannot be read or decoded; the text continues a sentence that begins with the record's name."""


def as_feature(name: str, value: Any) -> np.ndarray:
    """Returns the value or values of a feature, with the dtype that they get on a device by JAX's defaults.

    Raises:
      UserError: they are neither numbers nor booleans; `name` says where they are.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{name} has the dtype {array.dtype}; use numbers or booleans")
    return array.astype(_AS_ON_DEVICE.get(array.dtype.name, array.dtype), copy=False)


class Source(abc.ABC):
    """The records of a split, by number.

    A record maps the names of features to their values. "image" is an encoded image file (bytes) or a decoded image
    (uint8 [h, w, c]); "label" is an integer, -1 if the example is unlabeled; other features are numbers or arrays.
    Opening a source must be cheap: it neither reads all records nor lists them more than once. Several threads read at
    the same time.

    Attributes:
      fingerprint: depends on the contents as far as they are known without reading the records.
      channels: the number of channels of the images; encoded ones are decoded to it.
      labels: int32 [n], if the labels are known without reading the records.
      has_name: whether `research.data.check` can open it by its name.
    """

    fingerprint: str
    channels: int = 3
    has_name: bool = True
    labels: np.ndarray | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of records."""

    @abc.abstractmethod
    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """Returns a record.

        Raises:
          DamagedError: it is damaged or missing.
          UserError: it cannot be read now, for a reason that says nothing about its contents.
        """

    def record_name(self, number: int) -> str:
        """Names a record in messages: its file, if it has one of its own."""
        return f"example {number:,}"

    def keys(self) -> Iterable[bytes] | None:
        """Returns a name for each record that stays the same when others are added; None if there are none.

        With keys, whether a record is held out depends on its key only.
        """
        return None


class ArraySource(Source):
    """The examples of arrays [n, ...], one of them "image", whose images are to be cropped.

    Args:
      arrays: by feature.
      fingerprint: of the arrays.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], fingerprint: str):
        self._arrays = arrays
        self.fingerprint = fingerprint
        self.channels = arrays["image"].shape[-1]
        self.labels = arrays.get("label")

    def __len__(self) -> int:
        return len(self._arrays["image"])

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return {name: array[number] for name, array in self._arrays.items()}


class Subset(Source):
    """Some of the records of a source.

    Args:
      source: the source.
      numbers: int [n], the numbers of the records in the source.
    """

    def __init__(self, source: Source, numbers: np.ndarray):
        self._source = source
        self._numbers = numbers
        digest = hashlib.sha256(np.ascontiguousarray(numbers, np.int64).tobytes())
        self.fingerprint = f"{source.fingerprint}-{digest.hexdigest()[:8]}"
        self.channels = source.channels
        self.has_name = source.has_name
        self.labels = None if source.labels is None else source.labels[numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self._source[int(self._numbers[number])]

    def record_name(self, number: int) -> str:
        """Returns the record's name in the whole source."""
        return self._source.record_name(int(self._numbers[number]))

    def keys(self) -> Iterable[bytes] | None:
        """Returns the keys of these records."""
        keys = self._source.keys()
        if keys is None:
            return None
        everything = list(keys)
        return [everything[number] for number in self._numbers]


def held_out(keys: Iterable[bytes], fraction: float, salt: bytes) -> np.ndarray:
    """Decides for each key, by a hash of nothing else, whether its record is held out: others do not change that.

    Args:
      keys: names of records, see `Source.keys`.
      fraction: the fraction of all possible keys that is held out.
      salt: at most 16 bytes; another salt holds out others, independently.

    Returns:
      bool [n].
    """
    digests = b"".join(hashlib.blake2b(key, digest_size=8, salt=salt).digest() for key in keys)
    return np.frombuffer(digests, ">u8") < int(fraction * 2**64)
