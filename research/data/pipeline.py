"""The way of the examples to the devices: which ones a step takes is a pure function of (seed, step).

The training set is an endless row of epochs, each a permutation of it drawn from (seed, epoch), or, where examples
continue each other, the set in its own order; step s takes the examples s*b to (s+1)*b - 1 of that row. So an epoch
shows each example exactly once even where the batch size does not divide the set (only what is left of the last epoch,
less than a batch, is not used), any number of processes see the same batches, and a resumed run needs nothing but its
step.

A data set that fits lives on every device, and only example numbers travel; a larger one streams from the host through
grain, in the same order.
"""

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from research import randomness, sharding
from research.config import Config
from research.data.cache import Arrays
from research.errors import UserError
from research.randomness import Stream

Batch = dict[str, jax.Array]


@functools.lru_cache(maxsize=2)
def _order(seed: int | None, epoch: int, num_examples: int) -> np.ndarray:
    if seed is None:
        return np.arange(num_examples, dtype=np.int32)
    return randomness.generator(Stream.DATA_ORDER, seed, epoch).permutation(num_examples).astype(np.int32)


def example_numbers(seed: int | None, num_examples: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions start..stop-1 of the row of epochs: the examples' numbers and their epochs, both int32 [stop-start].

    Without a seed every epoch has the examples in their own order.
    """
    numbers, epochs = [], []
    for epoch in range(start // num_examples, -(-stop // num_examples)):
        first = epoch * num_examples
        part = _order(seed, epoch, num_examples)[max(start - first, 0) : stop - first]
        numbers.append(part)
        epochs.append(np.full(len(part), epoch, np.int32))
    return np.concatenate(numbers), np.concatenate(epochs)


def epoch_ends(num_examples: int, batch_size: int, num_epochs: int) -> list[int]:
    """The number of steps made when each epoch ends; the last is the number of train steps.

    Raises:
      UserError: the batch is larger than all the examples that training is to see, or there would be 2^31 steps.
    """
    if (steps := num_epochs * num_examples // batch_size) > np.iinfo(np.int32).max:
        raise UserError(f"--config.num_epochs={num_epochs}: {steps:,} steps are more than can be counted; lower it")
    ends = [(epoch + 1) * num_examples // batch_size for epoch in range(num_epochs)]
    if not ends[0]:
        raise UserError(f"--config.batch_size={batch_size} is larger than the training set ({num_examples:,} examples)")
    return ends


def longest_epoch(epoch_end_steps: Sequence[int]) -> int:
    """The most steps that an epoch has: where the batch size does not divide the data set, epochs differ by one."""
    return max(end - start for start, end in itertools.pairwise([0, *epoch_end_steps]))


def is_resident(config: Config, *splits: Arrays | None) -> bool:
    """Whether these splits together are small enough to live on the device."""
    size = sum(array.nbytes for split in splits if split for array in split.values())
    return size <= config.dataset.max_device_gib * 2**30


def _shareable(array: np.ndarray, mesh: Mesh) -> np.ndarray:
    """The same, of which several CPU devices will not have a copy each: in memory of jax's own."""
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return np.asarray(array)
    return np.asarray(jax.device_put(array, mesh.local_devices[0]))


class _Split:
    """A split's arrays, on the devices or on the host, and this process's part of what a step takes."""

    def __init__(self, arrays: Arrays, mesh: Mesh, *, resident: bool, data: dict[str, jax.Array] | None = None):
        self.num_examples = len(next(iter(arrays.values())))
        self._mesh = mesh
        self._streamed = {} if resident else arrays
        whole = sharding.replicated(mesh)
        self.data = data or {
            name: jax.make_array_from_process_local_data(whole, _shareable(array, mesh), array.shape)
            for name, array in (arrays if resident else {}).items()
        }

    def _local(self, size: int) -> np.ndarray:
        """The rows of a batch of `size` examples that this process's devices hold, in order: int [n].

        They need not be next to each other: a mesh goes along a TPU's torus, of which a host has a block.
        """
        parts = sharding.batch_sharding(self._mesh, 0).addressable_devices_indices_map((size,)).values()
        return np.unique([np.arange(size)[part[0]] for part in parts if part])

    def _examples(self, inputs: Arrays) -> Arrays:
        return inputs | {name: array[inputs["index"]] for name, array in self._streamed.items()}

    def _to_devices(self, inputs: Arrays, axis: int, size: int) -> dict[str, jax.Array]:
        """Global arrays of this process's parts; axis number `axis` counts the `size` examples of the whole batch."""
        placed = sharding.batch_sharding(self._mesh, axis)
        return {
            name: jax.make_array_from_process_local_data(placed, x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
            for name, x in inputs.items()
        }


class TrainBatches(_Split):
    """What the train steps take, dispatch by dispatch; `data` is that of others of the same arrays on the same mesh."""

    def __init__(
        self,
        arrays: Arrays,
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
        self._seed = config.seed if shuffle else None
        self._batch_size = config.batch_size
        self._microbatch_size = config.examples_at_once
        self._capacity = capacity
        self.go_to(start)

    def go_to(self, step: int) -> None:
        """The next that is taken is what step number `step` (from 0) would, had none been left out."""
        self._steps = self._iterate(step)

    def step_inputs(self, step: int) -> Arrays:
        """This process's part of one step: "index" and "epoch" int32 [m, b], and streamed examples [m, b, ...]."""
        start = step * self._batch_size
        index, epoch = example_numbers(self._seed, self.num_examples, start, start + self._batch_size)
        local = self._local(self._microbatch_size)
        inputs = {"index": index, "epoch": epoch}
        return self._examples({n: x.reshape(-1, self._microbatch_size)[:, local] for n, x in inputs.items()})

    def _iterate(self, start: int) -> Iterator[Arrays]:
        if not self._streamed:
            return map(self.step_inputs, iter(range(start, 2**62)))
        import grain  # slow to import, and most data sets do not stream

        steps = grain.MapDataset.range(start, 2**62).map(self.step_inputs)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * self._capacity)))

    def of_seed(self, seed: int) -> "TrainBatches":
        """The same examples from the first step on, in the order of another seed; on the devices they lie once."""
        other = copy.copy(self)
        other._seed = None if self._seed is None else seed
        other._steps = other._iterate(0)
        return other

    def take(self, num_steps: int) -> dict[str, jax.Array]:
        """The inputs of the next `num_steps` steps, padded with zeros to `capacity` steps: leaves [k, m, b, ...]."""
        return self._to_devices(self.take_local(num_steps), 2, self._microbatch_size)

    def take_local(self, num_steps: int) -> Arrays:
        """This process's part of `take`, on the host."""
        return self._pack([next(self._steps) for _ in range(num_steps)])

    def sample(self) -> dict[str, jax.Array]:
        """Inputs like those of `take`, to compile for; nothing is taken."""
        return self._to_devices(self._pack([self.step_inputs(0)]), 2, self._microbatch_size)

    def inputs_of_step(self, step: int) -> dict[str, jax.Array]:
        """The inputs of one step, leaves [1, m, b, ...]; nothing is taken."""
        inputs = {name: x[None] for name, x in self.step_inputs(step).items()}
        return self._to_devices(inputs, 2, self._microbatch_size)

    def _pack(self, steps: list[Arrays]) -> Arrays:
        def pack(*arrays: np.ndarray) -> np.ndarray:
            packed = np.zeros((self._capacity, *arrays[0].shape), arrays[0].dtype)
            packed[: len(arrays)] = arrays
            return packed

        return jax.tree.map(pack, *steps)


class EvalBatches(_Split):
    """What evaluation takes: every example once, in order, the last batch padded and masked."""

    def __init__(
        self,
        arrays: Arrays,
        config: Config,
        mesh: Mesh,
        *,
        resident: bool,
        data: dict[str, jax.Array] | None = None,
    ):
        super().__init__(arrays, mesh, resident=resident, data=data)
        self._batch_size = config.examples_at_once
        self._batches_per_dispatch = -(-self.num_examples // self._batch_size) if resident else 1

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Yields inputs of one dispatch each, leaves [k, b, ...]; "mask" (float32) is 0 for padding."""
        size = self._batches_per_dispatch * self._batch_size
        local = self._local(self._batch_size)
        for start in range(0, self.num_examples, size):
            numbers = np.arange(start, start + size, dtype=np.int32).reshape(-1, self._batch_size)[:, local]
            mask = numbers < self.num_examples
            inputs = self._examples({"index": np.where(mask, numbers, 0)}) | {"mask": mask.astype(np.float32)}
            yield self._to_devices(inputs, 1, self._batch_size)
