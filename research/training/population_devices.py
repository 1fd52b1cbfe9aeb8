"""How the members of a population lie on the devices, and how many of them one operation is made for."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import joblib
from jax.sharding import AxisType, Mesh

from research import sharding

AXIS = "population"


def at_once(platform: str, batch_size: int) -> int:
    """Members of a device that one operation is made for, the others after them.

    One on a CPU, where convolutions with a kernel for each member are slow and one member fills the cores. On an
    accelerator, which one small network leaves idle, as many as have a thousand examples together: 32 of the paper's
    CNN at batch 32 take 5 ms each for an epoch of the digits at once, 7 in eights, 11 alone (H200). A large batch fills
    it: eight epochs of airbench94, 2,000 images a step, take 1.3 s alone and 2.9 s for each of eight at once.
    """
    return 1 if platform == "cpu" else max(1, 1024 // batch_size)


def each(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of every member, `count` at once; members are the leading axis of its arguments."""
    options = {"batch_size": count} if count > 1 else {}
    return lambda *members: jax.lax.map(lambda member: function(*member), members, **options)


def split_cpu(most: int) -> bool:
    """Makes each core a device of its own, where that can still be done and nobody has said how many there are.

    Small networks do not fill several cores: of the paper's CNN at batch 32 members train 3.1 times as fast on 16 cores
    so, of a perceptron 4.9 times; on 2 cores 1.0 and 1.15 times, and still as fast where another program takes a part
    of one. What fills them loses little: ResNet-18 nothing, the CNN at batch 512 a fifth (2 cores).

    Args:
      most: devices; 0: as many as cores.

    Returns:
      Whether it did.
    """
    config: Any = jax.config
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or config.jax_num_cpu_devices != -1:
        return False
    count = joblib.cpu_count()  # that this process may use, by its affinity and its container's quota
    try:
        config.update("jax_num_cpu_devices", min(count, most or count))
    except RuntimeError:  # jax has started
        return False
    return True


def default_size(devices: Sequence[Any]) -> int:
    """Members that use these devices well; few, since a sampler learns nothing of those that still train."""
    of_each = max(2, -(-8 // len(devices))) if devices[0].platform == "cpu" else 32
    return len(devices) * of_each


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh that spreads members over devices; each has one."""
    shape = (len(devices), *[1] * len(sharding.AXES))
    return jax.make_mesh(shape, (AXIS, *sharding.AXES), axis_types=(AxisType.Auto,) * len(shape), devices=devices)
