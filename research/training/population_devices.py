"""How the members of a population are placed on the devices, and how many of them are vectorized together."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import joblib
from jax.sharding import AxisType, Mesh

from research import sharding
from research.config import MeshConfig
from research.errors import UserError

AXIS = "population"


def at_once(platform: str, batch_size: int) -> int:
    """Returns how many members of a device are vectorized together; the rest follow one after another.

    On a CPU: one, since convolutions with a kernel per member are slow and one member uses all cores. On an
    accelerator: as many as have about a thousand examples in a step, since one small network leaves it idle. For the
    tutorial CNN at batch size 32, an epoch of the digits takes 5 ms per member with 32 members together, 7 ms with 8,
    and 11 ms with 1 (H200). Large batches gain nothing: eight epochs of airbench94, with 2,000 images per step, take
    1.3 s with one member, and 2.9 s per member with eight.
    """
    return 1 if platform == "cpu" else max(1, 1024 // batch_size)


def map_members(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `function` over members, the leading axis of its arguments, with `count` of them vectorized together."""
    options = {"batch_size": count} if count > 1 else {}
    return lambda *members: jax.lax.map(lambda member: function(*member), members, **options)


def split_cpu(most: int) -> bool:
    """Makes each CPU core a JAX device, unless JAX has started or the number of devices is configured already.

    A small network does not use several cores: with a device per core, members of the tutorial CNN at batch size 32
    train 3.1 times as fast on 16 cores, and those of a perceptron 4.9 times; on 2 cores 1.0 and 1.15 times. Large
    programs lose little: on 2 cores ResNet-18 nothing, the CNN at batch size 512 a fifth.

    Args:
      most: the largest number of devices; 0: the number of cores.

    Returns:
      Whether the number of devices was set.
    """
    config: Any = jax.config
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or config.jax_num_cpu_devices != -1:
        return False
    count = joblib.cpu_count()  # cores available to this process: respects its CPU affinity and its container's quota
    try:
        config.update("jax_num_cpu_devices", min(count, most or count))
    except RuntimeError:  # jax has started
        return False
    return True


def default_size(devices: Sequence[Any]) -> int:
    """Returns how many members use these devices well; no more, since a sampler only learns from finished members."""
    per_device = max(2, -(-8 // len(devices))) if devices[0].platform == "cpu" else 32
    return len(devices) * per_device


def devices_per_member(mesh: MeshConfig, count: int) -> int:
    """Returns how many of `count` devices a member's mesh has: 1 with the default mesh, all if an axis is -1.

    Raises:
      UserError: the mesh is invalid, or `count` is not a multiple of its size.
    """
    if mesh == MeshConfig():
        return 1
    sizes = {axis: getattr(mesh, axis) for axis in sharding.AXES}
    size = count if -1 in sizes.values() else math.prod(sizes.values())
    if size and count % size:
        flags = " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise UserError(
            f"{flags}: each trial trains on {size} devices of one process, and the {count} here are no multiple of "
            f"{size}: give another mesh (a trial cannot span several processes)"
        )
    return math.prod(sharding.mesh_shape(mesh, size or count))


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """Returns a mesh that spreads members over the devices; each member is on one device."""
    shape = (len(devices), *[1] * len(sharding.AXES))
    return jax.make_mesh(shape, (AXIS, *sharding.AXES), axis_types=(AxisType.Auto,) * len(shape), devices=devices)
