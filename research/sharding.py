"""The device mesh, and the sharding rules of batches and parameters.

Mesh axes: `data` shards the batch; `fsdp` shards the batch and the parameters; `sequence` shards the time axis of
networks that are parallel over time; `model` shards a layer's output features. An experiment may have its own rules for
parameters (`research/sharding_rules.py`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.config import Config, MeshConfig
from research.errors import UserError

SEQUENCE = "sequence"
AXES = ("data", "fsdp", SEQUENCE, "model")
BATCH_AXES = ("data", "fsdp")


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int, int]:
    """Returns the mesh's sizes along `AXES`; -1 is replaced by the number of devices that the other axes leave.

    Raises:
      UserError: the sizes do not multiply to `device_count`, are 0, or more than one is -1.
    """
    sizes = (config.data, config.fsdp, config.sequence, config.model)
    flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
    fixed = math.prod(size for size in sizes if size != -1)
    if 0 in sizes or sizes.count(-1) > 1:
        raise UserError(f"{flags}: each axis needs at least 1 device, and only one axis may be -1")
    if device_count % fixed or (-1 not in sizes and fixed != device_count):
        raise UserError(f"{flags}: the sizes must multiply to the {device_count} devices here; let one axis be -1")
    data, fsdp, sequence, model = (device_count // fixed if size == -1 else size for size in sizes)
    return data, fsdp, sequence, model


def refuse_sequence(config: MeshConfig, what: str) -> None:
    """Raises `UserError` if the mesh shards the time axis, which `what` (named in the message) does not support."""
    if config.sequence != 1:
        raise UserError(f"--config.mesh.sequence={config.sequence}: {what} is not parallel over time; leave it at 1")


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over `devices` (default: all) and checks that it can shard the batch.

    Raises:
      UserError: the mesh does not fit the devices, or they do not divide a batch or microbatch.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config.mesh, len(devices))
    if config.mesh.reduce_dtype != "float32" and shape[0] != len(devices):
        raise UserError(
            f"--config.mesh.reduce_dtype={config.mesh.reduce_dtype}: with mesh axes other than `data` the compiler "
            "sums the gradients, in float32; give --config.mesh.reduce_dtype=float32"
        )
    shards = shape[0] * shape[1]
    for name in ("batch_size", "microbatch_size"):
        size = getattr(config, name)
        if size % shards:
            raise UserError(
                f"--config.{name}={size} cannot be split evenly over {shards} devices: use a multiple of {shards}"
            )
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arranges the devices in the mesh's shape, with neighbors in the mesh close to each other in the network.

    With several TPU slices, the first axis that they divide crosses the slower network between them.
    """
    # Not `jax.make_mesh`: it does not support slices, and splits a dimension of a torus over two axes on v5e only.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    crossing = next((i for i, size in enumerate(shape) if size % slices == 0), None)
    if crossing is None:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
        raise UserError(f"a mesh of {sizes} has no axis that is a multiple of the {slices} slices; make one a multiple")
    between_slices = [slices if i == crossing else 1 for i in range(len(shape))]
    within_slice = [size // count for size, count in zip(shape, between_slices)]
    return mesh_utils.create_hybrid_device_mesh(within_slice, between_slices, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Returns the sharding of arrays whose axis `axis` is the batch: split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))


def manual_batch_axes() -> tuple[str, ...] | None:
    """Returns the mesh axes over which the current `jax.shard_map` splits the batch; None outside of one."""
    return tuple(axis for axis in jax.sharding.get_abstract_mesh().manual_axes if axis in BATCH_AXES) or None


def is_unsharded() -> bool:
    """Returns whether GSPMD shards nothing here: one device, or arrays that `jax.shard_map` has split already."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())


def time_shards(length: int) -> int:
    """Returns into how many parts the mesh in context splits a time axis of `length` steps; 1 if they are not equal."""
    shards = jax.sharding.get_abstract_mesh().shape.get(SEQUENCE, 1)
    return 1 if length % shards else shards


def batch_shards(size: int) -> int:
    """Returns into how many parts GSPMD splits a batch of this size on the mesh in context; 1 if they are not equal."""
    shape = jax.sharding.get_abstract_mesh().shape
    shards = math.prod(shape[axis] for axis in _unsplit_batch_axes())
    return 1 if size % shards else shards


def _unsplit_batch_axes() -> tuple[str, ...]:
    """Returns the mesh axes of the batch that no `jax.shard_map` has split."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape and axis not in mesh.manual_axes)


def copy_to_shards(x: jax.Array, batch_shards: int, time_shards: int) -> jax.Array:
    """Repeats an array for each part of a batch and of a time axis: [batch_shards, time_shards, ...], sharded so."""
    copies = jnp.broadcast_to(x, (batch_shards, time_shards, *x.shape))
    over_batch = _unsplit_batch_axes() if batch_shards > 1 else None
    over_time = SEQUENCE if time_shards > 1 else None
    return jax.lax.with_sharding_constraint(copies, P(over_batch, over_time, *[P.UNCONSTRAINED] * x.ndim))


def vary(tree: Any) -> Any:
    """Marks arrays as different on each device, so that within `jax.shard_map` their gradients are not summed.

    There, the gradient of a replicated array is summed over the devices at once; that of the result is each device's
    own. Outside of `jax.shard_map`, nothing changes.
    """
    axes = manual_batch_axes()
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """Returns a key for each of the `count` examples here, by position in the global batch: the same on any mesh."""
    axes = manual_batch_axes()
    first = jax.lax.axis_index(axes) * count if axes else 0
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(count))


def next_examples(x: jax.Array) -> jax.Array:
    """Returns, for each example here, the next one of the global batch (for the last, the first): the same on any mesh.

    Each device gets one example from another.
    """
    if not (axes := manual_batch_axes()):
        return jnp.roll(x, -1, axis=0)
    mesh = jax.sharding.get_abstract_mesh()
    count = math.prod(mesh.shape[axis] for axis in axes)
    first_of_next = jax.lax.ppermute(x[:1], axes, [(i, (i - 1) % count) for i in range(count)])
    return jnp.concatenate([x[1:], first_of_next])


def batch_mean(x: jax.Array) -> jax.Array:
    """Computes the mean over the global batch of x, which is [b, ...] on this device."""
    axes = manual_batch_axes()
    return jax.lax.pmean(x.mean(0), axes) if axes else x.mean(0)


def partition_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the sharding rule of a parameter and of its optimizer state.

    The last axis (a layer's output features) is split over `model`, the largest other axis over `fsdp`. Axes that do
    not divide evenly are not split.
    """
    spec: list[str | None] = [None] * len(shape)
    if shape and mesh.shape["model"] > 1 and shape[-1] % mesh.shape["model"] == 0:
        spec[-1] = "model"
    free = [i for i, size in enumerate(shape) if spec[i] is None and size % mesh.shape["fsdp"] == 0]
    if free and mesh.shape["fsdp"] > 1:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*spec)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of a pytree of arrays or `jax.ShapeDtypeStruct`s, by `partition_spec`."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition_spec(leaf.shape, mesh)), tree)


def bytes_per_device(tree: Any) -> int:
    """Returns how many bytes of a pytree of sharded arrays one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gather(params: Any, mesh: Mesh, specs: Any = None, dtypes: Any = None) -> Any:
    """All-gathers the parameters, except along `model`, for use in layers; inside jit.

    Along `model`, a layer computes with its shards (Shoeybi et al. 2019, arXiv 1909.08053); along the other axes, they
    are only stored as shards (Zhao et al. 2023, arXiv 2304.11277).

    Args:
      params: a pytree of arrays.
      mesh: the devices.
      specs: a pytree of their PartitionSpecs; None: those of `partition_spec`.
      dtypes: a pytree of the dtypes in which they are transferred and rounded; None: their own.
    """
    # Explicit, not left to the compiler: the partitioner of jaxlib 0.10.2 on the CPU silently computes a wrong gradient
    # of a matrix product if the batch is sharded over (data, fsdp) and the kernel over (fsdp, model).
    specs = jax.tree.map(lambda x: partition_spec(x.shape, mesh), params) if specs is None else specs
    if not needs_gathering(specs):
        return params
    dtypes = jax.tree.map(lambda x: x.dtype, params) if dtypes is None else dtypes
    return jax.tree.map(functools.partial(_gather, mesh), specs, dtypes, params)


def needs_gathering(specs: Any) -> bool:
    """Returns whether `gather` gathers any parameters with these PartitionSpecs."""
    return not manual_batch_axes() and any(_gathered(spec) != spec for spec in jax.tree.leaves(specs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(mesh: Mesh, spec: P, dtype: Any, leaf: jax.Array) -> jax.Array:
    return _gather_forward(mesh, spec, dtype, leaf)[0]


def _gather_forward(mesh: Mesh, spec: P, dtype: Any, leaf: jax.Array) -> tuple[jax.Array, None]:
    whole = jax.lax.with_sharding_constraint(leaf.astype(dtype), NamedSharding(mesh, _gathered(spec)))
    return whole.astype(leaf.dtype), None


def _gathered(spec: P) -> P:
    return P(*("model" if axis == "model" or "model" in (axis or ()) else None for axis in spec))


def _gather_backward(mesh: Mesh, spec: P, dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Without this, the gradient would be replicated by an all-reduce, which transfers twice the bytes of a
    # reduce-scatter. Kernels of convolutions are exempt: libtpu 0.0.42 would convolve in pieces, in a ring, with a
    # third more FLOPs and nearly twice the bytes (ResNet-18 over 16 chips of v5e, estimated by launch.plan).
    kept = spec if gradient.ndim <= 2 else _gathered(spec)
    return (jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, kept)),)


_gather.defvjp(_gather_forward, _gather_backward)
