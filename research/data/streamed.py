"""Splits that are too large or too irregular for arrays: their examples are read, in threads, when they are needed."""

import concurrent.futures
import functools
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from research.data import crops
from research.data.example_reader import CropKey, ExampleReader
from research.data.source import DamagedError, Source
from research.dataset_config import DatasetConfig
from research.errors import UserError

_SAMPLE_SIZE = 512  # examples that statistics are computed from
_PROBES = 3  # examples that are read before training starts, or more if more may be damaged
_ROWS_AT_ONCE = 16  # of a batch, by one thread


@functools.cache
def reader_pool() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the threads that read and decode, one for each available core."""
    return concurrent.futures.ThreadPoolExecutor(_num_threads(), "read")


@functools.cache
def _num_threads() -> int:
    import joblib  # takes 0.1 s, which only streamed sets need to spend

    return joblib.cpu_count()  # cores available to this process: respects its CPU affinity and its container's quota


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
        self._reader = ExampleReader(role, source, config, num_classes)
        self._damaged: set[int] = set()
        self._lock = threading.Lock()
        if not len(source):
            raise UserError(f"--config.dataset.name={config.name}: the {role} split has no examples")
        self._features = self._probe()
        if config.image_size and "image" not in self._features:
            raise UserError(
                f"--config.dataset.name={config.name} has no images, so it has no --config.dataset.image_size"
            )
        self._columns: dict[str, Any] = {
            name: Column(self, name, shape, dtype) for name, (shape, dtype) in self._features.items()
        }
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
        """Changes with the examples, as far as they are known without reading them, and for train with the decoder."""
        return self._source.fingerprint + (f"-{crops.decoder()}" if self._role == "train" else "")

    def require_labels(self) -> None:
        """From now on, an unlabeled example counts as damaged."""
        self._reader.requires_labels = True

    def _probe(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns the shape and dtype of each feature, from the first readable one of a few examples."""
        numbers = spread(len(self._source), max(_PROBES, self._config.max_damaged + 1))
        reason = ""
        for number in numbers.tolist():
            try:
                example = self._reader.read(number)
                return {name: (value.shape, value.dtype) for name, value in example.items()}
            except DamagedError as error:
                reason = reason or f"{self._source.record_name(number)} {error}"
        raise UserError(
            f"--config.dataset.name={self._config.name}: none of {len(numbers)} examples of {self._role} is readable: "
            f"{reason}"
        )

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
        flat_epochs = epochs.ravel().tolist()

        def read(number: int, row: int, image_out: np.ndarray | None) -> dict[str, np.ndarray]:
            key = CropKey(seed, flat_epochs[row])
            for replacement in range(number, number + self.num_examples):
                if example := self._read(replacement % self.num_examples, key, tuple(self._features), image_out):
                    return example
            raise UserError(f"--config.dataset.name={self._config.name}: every example of {self._role} is damaged")

        return self._fill(numbers, tuple(self._features), read)

    def evaluation(self, numbers: np.ndarray, features: Sequence[str] = ()) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Reads examples as in evaluation, with the center of each image.

        Args:
          numbers: int [...], of the examples.
          features: which to read; none: all.

        Returns:
          The features, [..., *feature shape], and which examples are intact, bool [...]; damaged ones are zeros.

        Raises:
          UserError: more examples are damaged than `max_damaged` allows.
        """
        intact = np.ones(numbers.size, bool)
        features = tuple(features) or tuple(self._features)

        def read(number: int, row: int, image_out: np.ndarray | None) -> dict[str, np.ndarray]:
            example = self._read(number, None, features, image_out)
            intact[row] = bool(example)
            return example

        return self._fill(numbers, features, read), intact.reshape(numbers.shape)

    def _fill(
        self,
        numbers: np.ndarray,
        features: Sequence[str],
        read: Callable[[int, int, np.ndarray | None], Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Returns arrays of what `read(number, row, image_out)` returns for the numbers; zeros where it is {}."""
        described = {name: self._features[name] for name in features}
        arrays = {name: np.zeros((numbers.size, *shape), dtype) for name, (shape, dtype) in described.items()}
        flat = numbers.ravel().tolist()
        at_once = max(1, min(_ROWS_AT_ONCE, len(flat) // _num_threads()))

        def read_rows(start: int) -> None:
            for row in range(start, min(start + at_once, len(flat))):
                image_out = arrays["image"][row] if "image" in arrays else None
                for name, value in read(flat[row], row, image_out).items():
                    if value is not image_out:
                        arrays[name][row] = value

        if len(flat) <= at_once:
            read_rows(0)
        else:
            list(reader_pool().map(read_rows, range(0, len(flat), at_once)))
        return {name: array.reshape(*numbers.shape, *array.shape[1:]) for name, array in arrays.items()}

    def _read(
        self, number: int, key: CropKey | None, features: Sequence[str], image_out: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """Reads an example; returns {} if it is damaged."""
        if number in self._damaged:
            return {}
        try:
            example = self._reader.read(number, key, features, image_out)
        except DamagedError as error:
            self._report(number, error)
            return {}
        for name in features:
            first = self._features[name]
            if name not in example or (example[name].shape, example[name].dtype) != first:
                kind = f"{example[name].dtype}{list(example[name].shape)}" if name in example else "missing"
                raise UserError(
                    f"{self._reader.name(number)}: {name} is {kind}, but {first[1]}{list(first[0])} in other examples"
                )
        return example

    def _report(self, number: int, error: DamagedError) -> None:
        """Counts a damaged example and warns about it; raises `UserError` if there are more than allowed."""
        with self._lock:
            if number in self._damaged:
                return
            self._damaged.add(number)
            count, limit = len(self._damaged), self._config.max_damaged
        message = f"{self._reader.name(number)} {error}"
        if count > limit:
            data_dir = [f"--data_dir={self._config.data_dir}"] if self._config.data_dir else []
            command = shlex.join(["python", "-m", "research.data.check", self._config.name, *data_dir])
            advice = f"`{command}` lists all damaged examples; " if self._source.has_name else ""
            raise UserError(
                f"{message}: {advice}--config.dataset.max_damaged={max(2 * limit, 10)} skips up to that many"
            )
        print(f"WARNING: {message}: skipped ({count} of at most {limit})", file=sys.stderr, flush=True)


def spread(count: int, size: int) -> np.ndarray:
    """Returns the numbers of at most `size` examples, spread evenly over `count`."""
    return np.linspace(0, count - 1, min(count, size)).astype(int)


class Column:
    """A feature of a `StreamedSplit`, which can be indexed like an array: rows are read as in evaluation."""

    def __init__(self, split: StreamedSplit, feature: str, shape: tuple[int, ...], dtype: np.dtype):
        self.shape = (split.num_examples, *shape)
        self.dtype = dtype
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
        """Returns a fixed sample of the intact rows, spread evenly: to compute statistics, and to look at a few."""
        arrays, intact = self._split.evaluation(spread(len(self), size), (self._feature,))
        return arrays[self._feature][intact]
