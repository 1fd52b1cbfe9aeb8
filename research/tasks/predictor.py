"""Applies a trained network to host arrays, batch by batch: for plots, samples and costly final metrics."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from research import randomness, sharding
from research.data.batch import Batch
from research.network import gather, merge_network
from research.randomness import Stream
from research.sharding_rules import Rules

_PROGRESS_SECONDS = 10.0  # between progress lines where there is no progress bar

Function = Callable[[nnx.Module, Batch, jax.Array], Any]


class Predictor:
    """Applies functions of a network to host arrays, batch by batch; compiles each function once.

    Args:
      graphdef: the network's static part.
      params, model_state: its arrays, on the mesh.
      mesh: the devices.
      batch_size: examples of a batch, over all devices; a multiple of the number of devices that share a batch.
      rules: the experiment's sharding rules.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        model_state: Any,
        mesh: Mesh,
        batch_size: int,
        rules: Rules = MappingProxyType({}),
    ):
        self._graphdef = graphdef
        self._arrays = params, model_state
        self._mesh = mesh
        self._batch_size = batch_size
        self._rules = rules
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
        """Computes `function(network, batch, key)` for all examples.

        Args:
          function: returns a pytree of arrays [b, ...] for a batch; `batch.index` counts the examples from 0.
          arrays: the examples, [n, ...] each, n at least 1; the same on all processes.
          seed: of the random keys, one for each batch.
          batch_size: overrides the predictor's; rounded up to a multiple of the devices that share a batch.
          progress: title of a progress bar (on a terminal) or of progress lines; "" shows none.

        Returns:
          The pytree, with NumPy arrays [n, ...].
        """
        count = len(next(iter(arrays.values())))
        shards = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH_AXES)
        size = -(-min(batch_size or self._batch_size, count) // shards) * shards
        batch_sharding = sharding.batch_sharding(self._mesh, 0)
        parts = []
        for start in _with_progress(range(0, count, size), progress):
            # The last batch is padded with the last example, so that every batch has the same shape.
            index = np.minimum(np.arange(start, start + size), count - 1)
            local = Batch({}, index.astype(np.int32)).gather(arrays)
            batch = jax.tree.map(lambda x: jax.device_put(np.asarray(x), batch_sharding), local)
            key = jax.random.fold_in(randomness.key(Stream.PREDICTION, seed), start)
            parts.append(jax.device_get(self._apply(function, *self._arrays, batch, key)))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)

    def _merge_and_call(self, function: Function, params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        model = merge_network(self._graphdef, *gather(params, model_state, self._mesh, self._rules))
        return function(model, batch, key)


def _with_progress(starts: range, name: str) -> Iterator[int]:
    """Yields `starts`, and process 0 shows progress if there is a name."""
    if not name or jax.process_index():
        yield from starts
        return
    bar = tqdm(starts, desc=name, unit="batch", dynamic_ncols=True, disable=None)
    last = start_time = time.monotonic()
    for number, start in enumerate(bar, 1):
        yield start
        now = time.monotonic()
        # tqdm disables itself outside of a notebook if stderr is not a terminal.
        if bar.disable and now - last > _PROGRESS_SECONDS:
            last, left = now, tqdm.format_interval((now - start_time) / number * (len(starts) - number))
            print(f"{name}: batch {number:,}/{len(starts):,}  {left} left", flush=True)
