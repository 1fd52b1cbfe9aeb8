"""Checksums of sharded arrays, computed on the devices: the same for any sharding; replicas are compared.

Every device sums the bits of its own shard, and the sums of an array's shards add up to its checksum. Devices that hold
the same shard must have the same sum: a difference means that a device computed wrongly (silent data corruption), or
that the step is not the same on all devices.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.errors import ReplicaError

_FACTOR = 2654435761


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Returns the 32-bit checksum of every array, which any single flipped bit changes.

    Args:
      arrays: arrays with `NamedSharding`s on one mesh, whose axes are split evenly.

    Raises:
      ReplicaError: devices that hold the same shard of an array have different bits.
    """
    shardings = [array.sharding for array in arrays.values()]
    assert all(isinstance(sharding, NamedSharding) for sharding in shardings)
    mesh = shardings[0].mesh  # pyright: ignore[reportAttributeAccessIssue]
    specs = tuple(sharding.spec for sharding in shardings)  # pyright: ignore[reportAttributeAccessIssue]
    by_device = np.asarray(_device_sums(mesh, specs)(tuple(arrays.values())))  # [devices, arrays]
    return {
        name: _combine_shards(name, column, mesh, spec)
        for name, column, spec in zip(arrays, by_device.T, specs, strict=True)
    }


@functools.lru_cache(maxsize=8)
def _device_sums(mesh: Mesh, specs: tuple[P, ...]) -> jax.stages.Wrapped:
    def sums(arrays: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([_shard_sum(x, spec, mesh) for x, spec in zip(arrays, specs, strict=True)])[None]

    # check_vma=False: replicas are compared by their actual values, which may differ although their types say "equal".
    mapped = jax.shard_map(sums, mesh=mesh, in_specs=(specs,), out_specs=P(mesh.axis_names), check_vma=False)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, P()))


def _shard_sum(shard: jax.Array, spec: P, mesh: Mesh) -> jax.Array:
    """Returns the sum of the elements' bits, each times an odd factor from its position in the whole array, uint32.

    An odd factor is invertible modulo 2^32, so any single flipped bit changes the sum; and sums modulo 2^32 do not
    depend on their order.
    """
    bits = shard.astype(jnp.uint8) if shard.dtype == bool else shard
    bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.uint32(0)
    for axis, size in enumerate(shard.shape):
        split = spec[axis] if axis < len(spec) else None
        names = split if isinstance(split, tuple) else (split,) if split else ()
        count = int(np.prod([mesh.shape[name] for name in names]))
        first = jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(size) if names else jnp.uint32(0)
        index = first + jax.lax.broadcasted_iota(jnp.uint32, shard.shape, axis)
        position = position * jnp.uint32(size * count) + index
    return jnp.sum(bits * (position * jnp.uint32(_FACTOR) | jnp.uint32(1)), dtype=jnp.uint32)


def _combine_shards(name: str, sums: np.ndarray, mesh: Mesh, spec: P) -> int:
    """Returns the whole array's checksum; `sums` are those of each device, uint32 [devices] in the mesh's order."""
    used = {axis for split in spec if split for axis in (split if isinstance(split, tuple) else (split,))}
    axes = sorted(range(len(mesh.axis_names)), key=lambda i: mesh.axis_names[i] not in used)  # stable: split ones first
    shards = int(np.prod([mesh.shape[axis] for axis in used]))
    by_shard = sums.reshape(mesh.devices.shape).transpose(axes).reshape(shards, -1)
    differs = (by_shard != by_shard[:, :1]).any(1)
    if differs.any():
        shard = int(differs.argmax())
        devices = mesh.devices.transpose(axes).reshape(shards, -1)[shard]
        which = _describe_difference(devices, by_shard[shard])
        raise ReplicaError(
            f"{name} is not the same on all {len(devices)} devices that hold it ({which}): either a device computes "
            "wrongly (run its vendor's diagnostics), or the step is not the same on all devices; earlier checkpoints "
            "are intact"
        )
    return int(by_shard[:, 0].sum(dtype=np.uint32))


def _describe_difference(devices: np.ndarray, sums: np.ndarray) -> str:
    """Says which devices differ from the majority."""
    usual, count = Counter(sums.tolist()).most_common(1)[0]
    if 2 * count <= len(sums):
        names, verb = devices, "hold different bits, and no majority says which is right"
    else:
        names, verb = devices[sums != usual], "differ from the others"
    shown = [f"{device} of process {device.process_index}" for device in names[:8]]
    return f"{', '.join(shown)}{', ...' if len(names) > 8 else ''} {verb}"
