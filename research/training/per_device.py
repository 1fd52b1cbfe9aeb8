"""Per-device gradients: each device differentiates its own part of the batch, with one all-reduce per step.

By default the step is one program over the whole batch, which GSPMD partitions: any network gets the result of a single
device, but the gradients are all-reduced for every microbatch. Here each device accumulates the gradients of its part
of every microbatch, and only the sums are all-reduced: over two CPU processes a step of the tutorial CNN then scales
with an efficiency of 0.95 instead of 0.29.

The result is the same only if each example's loss does not depend on which other examples its device holds, which no
compiler can check. So both the task and the network must declare it, by a class attribute:

    per_device_gradients = True

A class that declares it must compute reductions over the batch with `sharding.batch_mean` (or a collective over
`sharding.manual_batch_axes`), and draw random numbers with `sharding.example_keys` only. Most wrong declarations raise
an error: from JAX while the step is traced, if the types show it (`check_vma`), otherwise from `check_losses`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from research import sharding
from research.errors import UserError
from research.layers.batch_norm import group_sizes
from research.tasks.task import Task

_ADVICE = "leave out per_device_gradients, or see research/training/per_device.py for its requirements"


def num_replicas(task: Task, mesh: Mesh, examples_at_once: int) -> int:
    """Returns how many devices compute per-device gradients: all, if declared and the mesh has only `data`; else 1.

    The declaration is not inherited: a subclass may override a method so that it no longer holds. It is 1, too, if a
    device's part of the `examples_at_once` does not consist of whole groups of batch norm.
    """
    if mesh.size == 1 or mesh.shape.get("data") != mesh.size:
        return 1
    network = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
    declared = all(vars(type(x)).get("per_device_gradients", False) for x in (task, network))
    whole = not any(examples_at_once // mesh.size % size for size in group_sizes(network))
    return mesh.size if declared and whole else 1


def on_each_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map`, with a note about `per_device_gradients` on type errors."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    def call(*args: Any) -> Any:
        try:
            return mapped(*args)
        except (TypeError, ValueError) as error:
            error.add_note(f"This step is traced for a part of the batch: {_ADVICE}.")
            raise

    return call


def reduce(collective: Callable[..., Any], tree: Any, mesh: Mesh) -> Any:
    """Returns the mean (`lax.pmean`) or the sum (`lax.psum`) over the devices, in one all-reduce."""
    # XLA combines the all-reduces of a tree, but on CPUs it still sends one array after another, at a few milliseconds
    # each, however small it is. So there the arrays are concatenated.
    if mesh.devices.flat[0].platform != "cpu":
        return collective(tree, sharding.BATCH_AXES)
    flat, unflatten = ravel_pytree(tree)
    return unflatten(collective(flat, sharding.BATCH_AXES))


def mean_gradients(grads: Any, metrics: Any, mesh: Mesh, dtype: str) -> tuple[Any, Any]:
    """Returns the means over the devices of gradients, which are all-reduced in `dtype`, and of metrics."""
    if dtype == "float32":
        return reduce(jax.lax.pmean, (grads, metrics), mesh)
    rounded = reduce(jax.lax.pmean, jax.tree.map(lambda x: x.astype(dtype), grads), mesh)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), rounded, grads), reduce(jax.lax.pmean, metrics, mesh)


def check_losses(whole: np.ndarray, parts: np.ndarray) -> None:
    """Compares the losses of the same examples, computed from the whole batch and by each device from its part.

    Args:
      whole, parts: float32 [b].

    Raises:
      UserError: they differ by more than rounding errors. Losses that are not finite are left to the train loop.
    """
    # Rounding errors are a hundredth of the standard deviation between examples (bfloat16: a twentieth), or 0.2% of the
    # loss. Other random numbers, batch statistics or neighbors change the losses by about the standard deviation.
    spread = max(float(whole.std()), 0.04 * float(np.sqrt(np.square(whole).mean())))
    error = float(np.sqrt(np.square(whole - parts).mean()))
    if np.isfinite(whole).all() and not error <= 0.1 * spread:  # `not <=`: also if it is NaN
        raise UserError(
            "per_device_gradients is declared, but the losses that the devices compute from their parts of the batch "
            f"are not those of the whole batch (RMS difference {error:.3g}, spread between examples {spread:.3g}): "
            f"{_ADVICE}"
        )
