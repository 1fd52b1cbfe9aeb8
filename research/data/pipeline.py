"""The input pipeline: which examples each step sees, and how they reach the devices.

The batch of a step is a pure function of (seed, step). The epochs are concatenated into one endless sequence of
examples: each epoch is a permutation of the training set drawn from (seed, epoch), or the set in its stored order if
examples continue each other (text). Step s takes positions s*B to (s+1)*B - 1 of that sequence. Therefore:

- Each example is seen exactly once an epoch, even if the batch size does not divide the set: a batch may span two
  epochs. Only the remainder of the last epoch, less than a batch, is unused.
- Any number of processes see the same batches, and a resumed run needs only its step.

There are two paths to the devices, with identical order. A data set that fits is *resident*: it is replicated to every
device, and only example numbers are transferred. Any other is *streamed*: each process gathers its rows on the host, or
reads, decodes and crops them (`research.data.streamed`), ahead of the step, through grain.

Indices:
  position: place in the endless sequence of examples; position // n is the epoch.
  number: an example's row in the data set, 0..n-1 (`Batch.index`).
  step: train step, from 0.

Leading axes of batches:
  k: steps of one dispatch, padded to a fixed capacity (training), or batches of one dispatch (evaluation).
  m: microbatches of one step, for gradient accumulation.
  b: examples of one microbatch, sharded over the mesh. Host arrays have only the rows of this process's devices.
  B: examples of one step, m * b over all devices.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research import randomness, sharding, trace
from research.config import Config
from research.data.batch import Batch
from research.data.sources import Split
from research.data.streamed import StreamedSplit
from research.errors import UserError
from research.randomness import Stream


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return randomness.generator(Stream.DATA_ORDER, seed, epoch).permutation(num_examples).astype(np.int32)


def example_numbers(seed: int | None, num_examples: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples at positions start..stop-1: their numbers and their epochs, both int32 [stop-start].

    Without a seed, every epoch has the examples in their stored order.
    """
    numbers, epochs = [], []
    for epoch in range(start // num_examples, -(-stop // num_examples)):
        first, last = max(start - epoch * num_examples, 0), min(stop - epoch * num_examples, num_examples)
        in_order = np.arange(first, last, dtype=np.int32)
        numbers.append(in_order if seed is None else _order(seed, epoch, num_examples)[in_order])
        epochs.append(np.full(len(in_order), epoch, np.int32))
    return np.concatenate(numbers), np.concatenate(epochs)


def epoch_ends(num_examples: int, config: Config) -> list[int]:
    """Returns the step count at the end of each epoch; the last is the number of train steps.

    With `config.num_steps` the last epoch may be a part of one.

    Raises:
      UserError: the batch is larger than the training set, or there would be 2^31 steps or more.
    """
    batch_size, (name, value) = config.batch_size, config.length
    steps = config.num_steps or config.num_epochs * num_examples // batch_size
    if steps > np.iinfo(np.int32).max:
        raise UserError(f"--config.{name}={value}: {steps:,} steps do not fit an int32; lower it")
    if batch_size > num_examples:
        raise UserError(f"--config.batch_size={batch_size} is larger than the training set ({num_examples:,} examples)")
    num_epochs = -(-steps * batch_size // num_examples) if config.num_steps else config.num_epochs
    return [min((epoch + 1) * num_examples // batch_size, steps) for epoch in range(num_epochs)]


def longest_epoch(epoch_end_steps: Sequence[int]) -> int:
    """Returns the most steps in an epoch: if the batch size does not divide the data set, epochs differ by one."""
    return max(end - start for start, end in itertools.pairwise([0, *epoch_end_steps]))


def is_resident(config: Config, *splits: Split | None) -> bool:
    """Returns whether these splits are arrays or texts that together fit --config.dataset.max_device_gib."""
    if any(isinstance(split, StreamedSplit) for split in splits):
        return False
    size = sum(array.nbytes for split in splits if split for array in split.values())
    return size <= config.dataset.max_device_gib * 2**30


def batch_bytes(config: Config, split: Split) -> int:
    """Returns the size of the examples of one step's batch, over all processes."""
    return config.batch_size * sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in split.values())


def _as_jax_memory(array: Any, mesh: Mesh) -> np.ndarray:
    """Copies the array into jax's memory where the mesh has several CPU devices, so that they share that one copy."""
    # jax aliases an aligned host buffer but copies any other, once for each device; its own buffers are aligned.
    array = np.asarray(array)
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return array
    return np.asarray(jax.device_put(array, mesh.local_devices[0]))


def _ahead(read: Callable[[int], Batch], numbers: range, num_steps: int) -> Iterator[Batch]:
    """Calls `read` for `numbers` in other threads, ahead of their use by at most `num_steps` + 2 batches."""
    import grain  # slow to import, and most data sets are resident

    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=num_steps)))


class _Split:
    """A split's arrays, resident on the devices or streamed from the host, and the transfer of batches.

    `data` holds the resident arrays, replicated; it is empty for a streamed split.
    """

    def __init__(self, arrays: Split, mesh: Mesh, *, resident: bool, data: dict[str, jax.Array] | None = None):
        self.num_examples = len(next(iter(arrays.values())))
        self._mesh = mesh
        self._streamed: Split = {} if resident else arrays
        replicated = sharding.replicated(mesh)
        self.data = data or {
            name: jax.make_array_from_process_local_data(replicated, _as_jax_memory(array, mesh), array.shape)
            for name, array in (arrays if resident else {}).items()
        }

    def _local_rows(self, size: int) -> np.ndarray:
        """Returns which rows of a batch of `size` examples this process's devices hold, in order: int [n].

        They need not be contiguous: the mesh follows a TPU's torus, of which a host has a block.
        """
        parts = sharding.batch_sharding(self._mesh, 0).addressable_devices_indices_map((size,)).values()
        return np.unique([np.arange(size)[part[0]] for part in parts if part])

    def _to_devices(self, batch: Batch, axis: int, size: int) -> Batch:
        """Makes global arrays of this process's rows; `axis` is the sharded one, of global length `size`."""
        sharded = sharding.batch_sharding(self._mesh, axis)

        def make_global(x: np.ndarray) -> jax.Array:
            shape = *x.shape[:axis], size, *x.shape[axis + 1 :]
            return jax.make_array_from_process_local_data(sharded, x, shape)

        return jax.tree.map(make_global, batch)


class TrainBatches(_Split):
    """The batches of training, dispatch by dispatch.

    Args:
      arrays: the training set.
      config: its batch size, microbatch size and seed are used.
      mesh: of the run.
      resident: whether the training set lives on the devices.
      capacity: the largest number of steps of a dispatch; smaller dispatches are padded to it.
      start: the first step.
      shuffle: whether each epoch is a new permutation.
      data: the resident arrays of another instance of the same arrays on the same mesh, to be shared.
    """

    def __init__(
        self,
        arrays: Split,
        config: Config,
        mesh: Mesh,
        *,
        resident: bool,
        capacity: int,
        start: int = 0,
        shuffle: bool = True,
        data: dict[str, jax.Array] | None = None,
    ):
        super().__init__(arrays, mesh, resident=resident, data=data)
        self._seed = config.seed
        self._shuffle = shuffle
        self._batch_size = config.batch_size
        self._microbatch_size = config.examples_at_once
        self._capacity = capacity
        self.seek(start)

    def seek(self, step: int) -> None:
        """Seeks to the batch of `step`."""
        self._steps = self._iterate(step)

    def local_batch(self, step: int) -> Batch:
        """Returns this process's rows of one step, host arrays [m, b, ...], with the features of a streamed split."""
        start = step * self._batch_size
        seed = self._seed if self._shuffle else None
        numbers = example_numbers(seed, self.num_examples, start, start + self._batch_size)
        rows = self._local_rows(self._microbatch_size)
        index, epoch = (x.reshape(-1, self._microbatch_size)[:, rows] for x in numbers)
        if isinstance(self._streamed, StreamedSplit):
            return Batch(self._streamed.training(index, epoch, self._seed), index, epoch)
        return Batch({}, index, epoch).gather(self._streamed)

    def _iterate(self, start: int) -> Iterator[Batch]:
        if not self._streamed:
            return map(self.local_batch, iter(range(start, 2**62)))
        return _ahead(self.local_batch, range(start, 2**62), 2 * self._capacity)

    def with_seed(self, seed: int) -> "TrainBatches":
        """Returns the batches of another seed, from the first step on; they share the resident arrays."""
        other = copy.copy(self)
        other._seed = seed
        other._steps = other._iterate(0)
        return other

    def take(self, num_steps: int) -> Batch:
        """Returns the batches of the next `num_steps` steps, padded with zeros to `capacity` steps: [k, m, b, ...]."""
        with jax.profiler.TraceAnnotation(trace.WAITING_FOR_DATA):
            return self._to_devices(self.take_local(num_steps), 2, self._microbatch_size)

    def take_local(self, num_steps: int) -> Batch:
        """Like `take`, but only this process's rows, as host arrays."""
        return self._pack([next(self._steps) for _ in range(num_steps)])

    def example(self) -> Batch:
        """Returns a batch with the shapes of `take`, to compile for; does not advance."""
        return self._to_devices(self._pack([self.local_batch(0)]), 2, self._microbatch_size)

    def batch(self, step: int) -> Batch:
        """Returns the batch of one step, [1, m, b, ...]; does not advance."""
        local = jax.tree.map(lambda x: x[None], self.local_batch(step))
        return self._to_devices(local, 2, self._microbatch_size)

    def _pack(self, steps: list[Batch]) -> Batch:
        def pack(*arrays: np.ndarray) -> np.ndarray:
            if self._capacity == 1:
                return arrays[0][None]  # without a copy
            packed = np.zeros((self._capacity, *arrays[0].shape), arrays[0].dtype)
            packed[: len(arrays)] = arrays
            return packed

        return jax.tree.map(pack, *steps)


class EvalBatches(_Split):
    """The batches of evaluation: every example once, in order, the last batch padded and masked.

    A resident split is evaluated in one dispatch, a streamed one in a dispatch for each batch.
    """

    def __init__(
        self,
        arrays: Split,
        config: Config,
        mesh: Mesh,
        *,
        resident: bool,
        data: dict[str, jax.Array] | None = None,
    ):
        super().__init__(arrays, mesh, resident=resident, data=data)
        self._batch_size = config.examples_at_once
        self._batches_per_dispatch = -(-self.num_examples // self._batch_size) if resident else 1

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of each dispatch, [k, b, ...]."""
        dispatches = range(-(-self.num_examples // (self._batches_per_dispatch * self._batch_size)))
        batches = _ahead(self._local_batch, dispatches, 2) if self._streamed else map(self._local_batch, dispatches)
        for batch in batches:
            yield self._to_devices(batch, 1, self._batch_size)

    def example(self) -> Batch:
        """Returns a batch with the shapes of those that are yielded, to compile for."""
        return self._to_devices(self._local_batch(0), 1, self._batch_size)

    def _local_batch(self, number: int) -> Batch:
        """Returns this process's rows of a dispatch, as host arrays."""
        size = self._batches_per_dispatch * self._batch_size
        rows = self._local_rows(self._batch_size)
        numbers = np.arange(number * size, (number + 1) * size, dtype=np.int32).reshape(-1, self._batch_size)[:, rows]
        is_example = numbers < self.num_examples
        batch = Batch({}, np.where(is_example, numbers, 0), mask=is_example.astype(np.float32))
        if not isinstance(self._streamed, StreamedSplit):
            return batch.gather(self._streamed)
        features, is_intact = self._streamed.evaluation(batch.index)
        return dataclasses.replace(batch, features=features, mask=(is_example & is_intact).astype(np.float32))
