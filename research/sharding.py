"""The device mesh, and the rules that say how arrays lie on it.

Axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `sequence` splits the time axis of what is
parallel over time, `model` splits a layer's output features.
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

AXES = ("data", "fsdp", "sequence", "model")
BATCH_AXES = ("data", "fsdp")


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int, int]:
    """The mesh's sizes along `AXES`, with -1 replaced by the devices that the other axes leave.

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
    """For what cannot share a time axis.

    Raises:
      UserError: the mesh is asked to split it.
    """
    if config.sequence != 1:
        raise UserError(f"--config.mesh.sequence={config.sequence}: {what} is not parallel over time; leave it 1")


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all); checks that it can share the batch.

    Raises:
      UserError: the mesh does not fit the devices, or a (micro)batch cannot be split evenly over them.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config.mesh, len(devices))
    if config.mesh.reduce_dtype != "float32" and shape[0] != len(devices):
        raise UserError(
            f"--config.mesh.reduce_dtype={config.mesh.reduce_dtype}: where the mesh has other axes than `data` the "
            "compiler sums the gradients, in float32; leave it out"
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
    """The devices in the mesh's shape, neighbours near each other.

    Of several TPU slices the first axis that can crosses the slower network between them. `jax.make_mesh` has no
    slices, and splits a dimension of a torus over two axes on v5e only.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    crossing = next((i for i, size in enumerate(shape) if size % slices == 0), None)
    if crossing is None:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
        raise UserError(f"a mesh of {sizes} has no axis that {slices} slices can share: make one a multiple of it")
    between = [slices if i == crossing else 1 for i in range(len(shape))]
    within = [size // count for size, count in zip(shape, between)]
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Arrays whose axis number `axis` counts examples: split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))


def manual_batch_axes() -> tuple[str, ...] | None:
    """The mesh axes over which this code, within `jax.shard_map`, has a part of the batch; None: it has the whole."""
    return tuple(axis for axis in jax.sharding.get_abstract_mesh().manual_axes if axis in BATCH_AXES) or None


def is_unsharded() -> bool:
    """Whether one device has all of an array here, and no partitioner splits it."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size == 1 or axis in mesh.manual_axes for axis, size in mesh.shape.items())


def vary(tree: Any) -> Any:
    """Gives each device an array of its own to differentiate, where it has a part of the batch.

    Within `jax.shard_map` the gradient with respect to a replicated array is summed over the devices at once. That of
    what this returns is each device's own.
    """
    axes = manual_batch_axes()
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """A key for each of the `count` examples here, by its position in the whole batch: the same on any mesh."""
    axes = manual_batch_axes()
    first = jax.lax.axis_index(axes) * count if axes else 0
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(count))


def batch_mean(x: jax.Array) -> jax.Array:
    """The mean over the whole batch of what is [b, ...] here."""
    axes = manual_batch_axes()
    return jax.lax.pmean(x.mean(0), axes) if axes else x.mean(0)


def partition_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where a parameter, or an optimiser's copy of it, is split.

    The last axis (a layer's output features) goes over `model`; the largest other axis over `fsdp`. An axis that does
    not divide evenly stays whole.
    """
    spec: list[str | None] = [None] * len(shape)
    if shape and mesh.shape["model"] > 1 and shape[-1] % mesh.shape["model"] == 0:
        spec[-1] = "model"
    free = [i for i, size in enumerate(shape) if spec[i] is None and size % mesh.shape["fsdp"] == 0]
    if free and mesh.shape["fsdp"] > 1:
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*spec)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of arrays or `jax.ShapeDtypeStruct`s, by `partition_spec`."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition_spec(leaf.shape, mesh)), tree)


def bytes_per_device(tree: Any) -> int:
    """How many bytes of a tree of sharded arrays one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gather(params: Any, mesh: Mesh) -> Any:
    """The parameters whole along `fsdp`, as a layer needs them: inside jit, an all-gather.

    It is asked for, not left to the compiler. That is what fully sharded data parallelism means (Zhao et al. 2023,
    arXiv 2304.11277), and the partitioner of jaxlib 0.10.2 on the CPU gets a matrix product's gradient wrong, without
    a word, where the batch lies over (data, fsdp) and the kernel over (fsdp, model).
    """
    return params if mesh.shape["fsdp"] == 1 else jax.tree.map(functools.partial(_gather, mesh), params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(mesh: Mesh, leaf: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _whole_along_fsdp(leaf.shape, mesh)))


def _whole_along_fsdp(shape: tuple[int, ...], mesh: Mesh) -> P:
    return P(*(None if axis == "fsdp" else axis for axis in partition_spec(shape, mesh)))


def _gather_forward(mesh: Mesh, leaf: jax.Array) -> tuple[jax.Array, None]:
    return _gather(mesh, leaf), None


def _gather_backward(mesh: Mesh, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # The constraint's own gradient would be whole on every device, by an all-reduce, which sends twice what a
    # reduce-scatter does. Not so a convolution's: libtpu 0.0.42 then convolves part by part, in a ring, with a third
    # more FLOPs and nearly twice the bytes (ResNet-18 over 16 chips of v5e, by launch.plan).
    spec = (partition_spec if gradient.ndim <= 2 else _whole_along_fsdp)(gradient.shape, mesh)
    return (jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, spec)),)


_gather.defvjp(_gather_forward, _gather_backward)
