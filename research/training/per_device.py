"""Per-device gradients: each device differentiates its own part of the batch, and one all-reduce a step adds them up.

By default the step is one program over the whole batch, which GSPMD partitions: it gives any network the result of one
device, but sums the gradients of every microbatch over the network. Here a device adds up the gradients of its part of
every microbatch, and only the sums travel: over two CPU processes a step of the tutorial CNN then scales with an
efficiency of 0.95 instead of 0.29.

That is the same step only where the loss of a part of the batch is that part of the loss of the batch, which no
compiler can see. So the task and the network declare it, each by a class attribute of its own:

    per_device_gradients = True

A class that declares it computes reductions over the batch with `sharding.batch_mean` (or a collective over
`sharding.manual_batch_axes`), and draws random numbers by `sharding.example_keys` only. Most wrong declarations get an
error: from JAX while the step is traced, where the types show it (`check_vma`), else from `check_losses`.
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
from research.tasks.task import Task

_ADVICE = "leave out per_device_gradients, or see research/training/per_device.py for what it promises"


def num_replicas(task: Task, mesh: Mesh) -> int:
    """How many devices make gradients of their own: all of a mesh that only has `data`, where it is declared; else 1.

    The declaration is not inherited: a subclass that overrides anything may break the promise of its base.
    """
    if mesh.size == 1 or mesh.shape.get("data") != mesh.size:
        return 1
    network = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
    declared = all(vars(type(x)).get("per_device_gradients", False) for x in (task, network))
    return mesh.size if declared else 1


def on_each_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map`, whose type errors say what was declared."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    def call(*args: Any) -> Any:
        try:
            return mapped(*args)
        except (TypeError, ValueError) as error:
            error.add_note(f"This step is traced for a part of the batch: {_ADVICE}.")
            raise

    return call


def reduce(collective: Callable[..., Any], tree: Any, mesh: Mesh) -> Any:
    """The mean (`lax.pmean`) or the sum (`lax.psum`) over the devices, in one all-reduce.

    XLA joins the all-reduces of a tree. But on the CPU it still hands them to the network one by one, at a few
    milliseconds each however small they are, so there they are made one vector.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return collective(tree, sharding.BATCH_AXES)
    flat, unflatten = ravel_pytree(tree)
    return unflatten(collective(flat, sharding.BATCH_AXES))


def mean_gradients(grads: Any, metrics: Any, mesh: Mesh, dtype: str) -> tuple[Any, Any]:
    """The means over the devices of gradients, which travel as `dtype`, and of metrics."""
    if dtype == "float32":
        return reduce(jax.lax.pmean, (grads, metrics), mesh)
    rounded = reduce(jax.lax.pmean, jax.tree.map(lambda x: x.astype(dtype), grads), mesh)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), rounded, grads), reduce(jax.lax.pmean, metrics, mesh)


def check_losses(whole: np.ndarray, parts: np.ndarray) -> None:
    """Compares the losses of the same examples, computed from the whole batch and by each device from its part.

    Rounding moves them by a hundredth of what they differ between examples, bfloat16's by a twentieth, or by 0.2% of
    the loss. Other noise, statistics or neighbors move them by as much as they differ.

    Args:
      whole, parts: float32 [b].

    Raises:
      UserError: they differ by more than rounding. Where those of the whole are not finite, training says so.
    """
    spread = max(float(whole.std()), 0.04 * float(np.sqrt(np.square(whole).mean())))
    error = float(np.sqrt(np.square(whole - parts).mean()))
    if np.isfinite(whole).all() and not error <= 0.1 * spread:  # or NaN
        raise UserError(
            "per_device_gradients is declared, but the losses that the devices compute from their parts of the batch "
            f"are not those of the whole batch (they differ by {error:.3g} where examples differ by {spread:.3g}): "
            f"{_ADVICE}"
        )
