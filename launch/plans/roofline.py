"""A roofline estimate of the step time, from the vendors' specifications.

Each term is a lower bound, and communication is assumed not to overlap with computation. The time of a collective over
a torus follows https://jax-ml.github.io/scaling-book/sharding: the larger of volume / bandwidth and hops * latency.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from launch.plans.hlo import Collective
from launch.plans.topologies import Topology, spanned

# Traffic through each device's links, as a fraction of the whole array. In an all-to-all, chunks travel at most half
# way around a ring.
_VOLUMES = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 0.25}


# A hop between neighbors takes about a microsecond (https://jax-ml.github.io/scaling-book/sharding).
_HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The terms of the step time, in seconds."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) + self.interconnect


def roofline(
    topology: Topology,
    dtype: str,
    flops_per_chip: float,
    bytes_per_chip: float,
    collectives: Sequence[Collective],
    devices: Sequence[Any],
) -> Roofline:
    """Estimates the terms of one step.

    Args:
      topology: the chips.
      dtype: of the matrix products, "float32" or "bfloat16".
      flops_per_chip, bytes_per_chip: FLOPs and bytes accessed in a step.
      collectives: the collectives of a step.
      devices: the devices of the mesh, in its order.
    """
    chip = topology.chip
    interconnect = sum(row.count * collective_seconds(row, topology, devices) for row in collectives)
    return Roofline(flops_per_chip / chip.flops(dtype), bytes_per_chip / chip.memory_bandwidth, interconnect)


def collective_seconds(row: Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """The time of one collective: first within the slices, then between them."""
    chip = topology.chip
    if row.slices:
        bandwidth = chip.network_bandwidth / chip.devices
        return _VOLUMES.get(row.kind, 1.0) * row.bytes * (row.slices - 1) / row.slices / bandwidth
    slices, chips, extents = spanned([topology.place(devices[number]) for number in row.group])
    volume = _VOLUMES.get(row.kind, 1.0) * row.bytes
    if row.kind.startswith("collective-"):
        # A permute goes over one link to a neighbor, or over the network.
        return row.bytes / (chip.link_bandwidth if slices == 1 else chip.network_bandwidth) + _HOP_SECONDS
    seconds = 0.0
    if chips > 1:
        spread = [size for size in extents if size > 1]
        rings = [size % chip.ring == 0 for size in spread]
        bandwidth = chip.link_bandwidth * sum(2 if ring else 1 for ring in rings)
        hops = sum(size // 2 if ring else size - 1 for size, ring in zip(spread, rings))
        latency = _HOP_SECONDS * hops * (2 if row.kind == "all-reduce" else 1)
        seconds = max(volume * (chips - 1) / chips / bandwidth, latency)
    if slices > 1:
        seconds += volume / chips * (slices - 1) / slices / chip.network_bandwidth
    return seconds
