"""A trained network applied to arrays on the host: for pictures, samples and figures that the loop does not have."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from research import randomness, sharding
from research.data.pipeline import Batch
from research.network import merge_network
from research.randomness import Stream

_SECONDS_BETWEEN_PLAIN_LINES = 10.0

Function = Callable[[nnx.Module, Batch, jax.Array], Any]


class Predictor:
    """Applies functions of a network, batch by batch, each compiled once.

    Args:
      graphdef: the network's static part.
      params, model_state: its arrays, on the mesh.
      mesh: the devices.
      batch_size: examples at once, over all devices; a multiple of those that share a batch.
    """

    def __init__(self, graphdef: nnx.GraphDef, params: Any, model_state: Any, mesh: Mesh, batch_size: int):
        self._graphdef = graphdef
        self._arrays = params, model_state
        self._mesh = mesh
        self._batch_size = batch_size
        self._apply = jax.jit(self._merge_and_call, static_argnums=0, out_shardings=sharding.replicated(mesh))

    def __call__(
        self,
        function: Function,
        arrays: Mapping[str, np.ndarray],
        *,
        seed: int = 0,
        batch_size: int = 0,
        progress: str = "",
    ) -> Any:
        """`function(network, batch, key)` of every example.

        Args:
          function: gives a tree of arrays [b, ...] for a batch whose arrays are [b, ...].
          arrays: the examples, [n, ...] each, n at least 1; all processes give the same.
          seed: of the keys, one for each batch.
          batch_size: instead of the predictor's own; it is rounded up to what the devices can share.
          progress: the name under which progress is shown: a bar on a terminal, else a line now and then.

        Returns:
          The tree, of NumPy arrays [n, ...].
        """
        count = len(next(iter(arrays.values())))
        shards = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH_AXES)
        size = -(-min(batch_size or self._batch_size, count) // shards) * shards
        rows = sharding.batch_sharding(self._mesh, 0)
        parts = []
        for start in _shown(range(0, count, size), progress):
            index = np.minimum(np.arange(start, start + size), count - 1)
            batch = {name: jax.device_put(np.asarray(array[index]), rows) for name, array in arrays.items()}
            key = jax.random.fold_in(randomness.key(Stream.PREDICTION, seed), start)
            parts.append(jax.device_get(self._apply(function, *self._arrays, batch, key)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)

    def _merge_and_call(self, function: Function, params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        model = merge_network(self._graphdef, sharding.gather(params, self._mesh), model_state)
        return function(model, batch, key)


def _shown(starts: range, name: str) -> Iterator[int]:
    """The same numbers, with progress where it has a name."""
    if not name or jax.process_index():
        yield from starts
        return
    bar = tqdm(starts, desc=name, unit="batch", dynamic_ncols=True, disable=None)
    last = began = time.monotonic()
    for number, start in enumerate(bar, 1):
        yield start
        now = time.monotonic()
        if bar.disable and now - last > _SECONDS_BETWEEN_PLAIN_LINES:
            last, left = now, tqdm.format_interval((now - began) / number * (len(starts) - number))
            print(f"{name}: batch {number:,}/{len(starts):,}  {left} left", flush=True)
