"""Splits that are too large or too irregular for arrays: their records are read, decoded and cropped when needed."""

import concurrent.futures
import dataclasses
import functools
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from research import randomness
from research.data import crops, decoding
from research.data.source import DamagedError, Source
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.randomness import Stream

_SAMPLE_SIZE = 512  # examples that statistics are computed from
_PROBES = 3  # examples that are read before training starts
_ROWS_AT_ONCE = 16  # of a batch, by one thread


@functools.cache
def threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the threads that read and decode, one for each core that this process may use."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return concurrent.futures.ThreadPoolExecutor(num_cores, "read")


@dataclasses.dataclass(frozen=True)
class _Draw:
    """What the random crop of a training example depends on, besides its number."""

    seed: int
    epoch: int


class StreamedSplit(Mapping[str, "Column"]):
    """A split whose examples are read when they are needed.

    It maps the names of features to columns, which have a shape and a dtype and can be indexed like arrays; `training`
    and `evaluation` read all features of the examples of a batch, in several threads.

    Args:
      role: "train", "validation" or "test".
      source: the records.
      config: the size of the images, and how they are cropped.
      num_classes: labels must be below it; 0: any.

    Raises:
      UserError: the split has no examples or no readable ones, or images without `config.image_size`.
    """

    def __init__(self, role: str, source: Source, config: DatasetConfig, num_classes: int = 0):
        self._role = role
        self._source = source
        self._config = config
        self._num_classes = num_classes
        self._size = config.image_size
        if role == "train":
            self._size = config.train_image_size or self._size
        self._damaged: set[int] = set()
        self._lock = threading.Lock()
        if not len(source):
            raise UserError(f"--config.dataset.name={config.name}: the {role} split has no examples")
        self._features = self._probe()
        if config.image_size and "image" not in self._features:
            raise UserError(
                f"--config.dataset.name={config.name} has no images, so it has no --config.dataset.image_size"
            )
        self._columns: dict[str, Any] = {name: Column(self, name) for name in self._features}
        if source.labels is not None and "label" in self._columns:
            self._columns["label"] = source.labels

    def __getitem__(self, feature: str) -> "Column":
        return self._columns[feature]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def num_examples(self) -> int:
        """The number of examples; `len` is the number of features."""
        return len(self._source)

    @property
    def fingerprint(self) -> str:
        """Changes with the examples, as far as they are known without reading them."""
        return self._source.fingerprint

    def _probe(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the shape and dtype of each feature, from the first readable one of a few examples."""
        reason = ""
        for number in np.linspace(0, len(self._source) - 1, _PROBES).astype(int):
            try:
                example = self._example(int(number), None)
                return {name: (value.shape, value.dtype) for name, value in example.items()}
            except DamagedError as error:
                reason = reason or f"{self._source.record_name(int(number))} {error}"
        raise UserError(f"--config.dataset.name={self._config.name}: no example of {self._role} is readable: {reason}")

    def training(self, numbers: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Reads training examples, each with a random crop that depends on the seed, its epoch and its number only.

        A damaged example is replaced by the next one, if `max_damaged` allows.

        Args:
          numbers: int [...], of the examples.
          epochs: int, of the same shape.
          seed: of the crops.

        Returns:
          The features, [..., *feature shape].

        Raises:
          UserError: more examples are damaged than `max_damaged` allows.
        """
        arrays = self._allocate(numbers.size, self._features)
        pairs = list(zip(numbers.ravel().tolist(), epochs.ravel().tolist()))

        def read(row: int) -> None:
            number, epoch = pairs[row]
            for replacement in range(number, number + self.num_examples):
                if self._read(arrays, row, replacement % self.num_examples, _Draw(seed, epoch)):
                    return

        self._in_threads(read, numbers.size)
        return {name: array.reshape(*numbers.shape, *array.shape[1:]) for name, array in arrays.items()}

    def evaluation(
        self, numbers: np.ndarray, features: tuple[str, ...] = ()
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Reads examples as in evaluation, with the center of each image.

        Args:
          numbers: int [...], of the examples.
          features: which to read; none: all.

        Returns:
          The features, [..., *feature shape], and which examples are intact, bool [...]; damaged ones are zeros.

        Raises:
          UserError: more examples are damaged than `max_damaged` allows.
        """
        chosen = {name: self._features[name] for name in features or self._features}
        arrays, intact = self._allocate(numbers.size, chosen), np.ones(numbers.size, bool)
        flat = numbers.ravel().tolist()

        def read(row: int) -> None:
            intact[row] = self._read(arrays, row, flat[row], None)

        self._in_threads(read, numbers.size)
        arrays = {name: array.reshape(*numbers.shape, *array.shape[1:]) for name, array in arrays.items()}
        return arrays, intact.reshape(numbers.shape)

    def _allocate(self, count: int, features: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
        return {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in features.items()}

    def _in_threads(self, read: Any, count: int) -> None:
        def read_rows(start: int) -> None:
            for row in range(start, min(start + _ROWS_AT_ONCE, count)):
                read(row)

        starts = range(0, count, _ROWS_AT_ONCE)
        if len(starts) <= 1:
            read_rows(0)
        else:
            list(threads().map(read_rows, starts))

    def _read(self, arrays: dict[str, np.ndarray], row: int, number: int, draw: _Draw | None) -> bool:
        """Reads an example into a row of `arrays`; returns False if it is damaged."""
        if number in self._damaged:
            return False
        try:
            example = self._example(number, draw, arrays)
        except DamagedError as error:
            self._report(number, error)
            return False
        for name, array in arrays.items():
            shape = example[name].shape if name in example else "none"
            if shape != array.shape[1:]:
                raise UserError(
                    f"{self._role}, {self._source.record_name(number)}: the shape of {name} is {shape}, not "
                    f"{array.shape[1:]} as in the first example"
                )
            array[row] = example[name]
        return True

    def _example(self, number: int, draw: _Draw | None, only: Any = None) -> dict[str, np.ndarray]:
        """Reads the features of an example in `only` (None: all), with a random crop if `draw` is given."""
        record = self._source[number]
        return {
            name: self._image(value, number, draw) if name == "image" else self._feature(name, value)
            for name, value in record.items()
            if only is None or name in only
        }

    def _feature(self, name: str, value: Any) -> np.ndarray:
        if name != "label":
            array = np.asarray(value)
            return array.astype({"float64": np.float32, "int64": np.int32}.get(array.dtype.name, array.dtype))
        if self._num_classes and not -1 <= value < self._num_classes:
            raise DamagedError(f"has the label {value}, which is not in 0..{self._num_classes - 1}")
        return np.asarray(value, np.int32)

    def _image(self, image: Any, number: int, draw: _Draw | None) -> np.ndarray:
        size, config = self._size, self._config
        if not size:
            if isinstance(image, bytes):
                raise UserError(
                    f"--config.dataset.name={config.name} has image files of any size: choose the size that they are "
                    "resized to, as in --config.dataset.image_size=128"
                )
            return np.asarray(image)
        channels = self._source.channels if isinstance(image, bytes) else image.shape[-1]
        try:
            if draw is None:
                return decoding.decode_center(image, channels, size, config.center_crop)
            rng = randomness.generator(Stream.CROP, draw.seed, draw.epoch, number)
            out = np.empty((size, size, channels), np.uint8)
            if config.train_crop == "resize":
                crops.crop(image, lambda h, w: crops.random_square(h, w, rng), out)
            else:
                crops.crop(image, lambda h, w: crops.random_resized(h, w, rng, config.crop_min_area), out)
            return out
        except decoding.ImageError as error:
            raise DamagedError(str(error)) from None

    def _report(self, number: int, error: DamagedError) -> None:
        """Counts a damaged example and warns about it; raises `UserError` if there are more than allowed."""
        with self._lock:
            if number in self._damaged:
                return
            self._damaged.add(number)
            count, most = len(self._damaged), self._config.max_damaged
        message = f"{self._role}, {self._source.record_name(number)} {error}"
        if count > most:
            data_dir = [f"--data_dir={self._config.data_dir}"] if self._config.data_dir else []
            dataset = shlex.join([self._config.name, *data_dir])
            raise UserError(
                f"{message}: `python -m research.data.check {dataset}` lists all damaged examples; "
                f"--config.dataset.max_damaged={max(2 * most, 10)} does without up to as many"
            )
        print(f"WARNING: {message}: does without it ({count} of at most {most})", file=sys.stderr, flush=True)


class Column:
    """A feature of a `StreamedSplit`, which can be indexed like an array: rows are read as in evaluation."""

    def __init__(self, split: StreamedSplit, feature: str):
        shape, self.dtype = split._features[feature]
        self.shape = (split.num_examples, *shape)
        self.ndim = len(self.shape)
        self._split = split
        self._feature = feature

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *others = index if isinstance(index, tuple) else (index,)
        numbers = np.arange(len(self))[rows]
        read = self._split.evaluation(np.atleast_1d(numbers), (self._feature,))[0][self._feature]
        read = read if np.ndim(numbers) else read[0]
        return read[(slice(None),) * np.ndim(numbers) + tuple(others)] if others else read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def sample(self, size: int = _SAMPLE_SIZE) -> np.ndarray:
        """Returns a fixed sample of the rows, spread evenly: to compute statistics, and to look at a few."""
        return self[np.linspace(0, len(self) - 1, min(len(self), size)).astype(int)]
