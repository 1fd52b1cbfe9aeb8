"""Topologies: names of TPU slices and GPU machines, and devices to compile for that need not exist on this machine.

A TPU slice is named as Google does (v5e-256, v5p-2048; the number counts chips for v5e and v6e, and TensorCores, two
per chip, for the others) or by its shape in chips (v5e:16x16, v4:8x16x16). For GPUs, h100-8 is one machine and h100-64
is eight.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from launch.plans.gpu_targets import TARGETS
from research.chips import CHIPS, Chip
from research.errors import UserError

LARGEST_SLICE = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 9216}  # chips, by the pages in CHIPS
_GPUS_PER_MACHINE = 8
_MAX_GPUS = 131_072
_MAX_STAND_INS = 2048  # XLA:CPU assigns further devices to another process
_NAMED_BY_CORES = ("v4", "v5p", "tpu7x")  # slice names of these count TensorCores


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips, and how they are connected.

    Attributes:
      chip: the kind of chip.
      shape: chips along each dimension of a slice; for GPUs, (GPUs per machine,).
      slices: number of slices or machines, connected by the data center network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """The name by shape, as in v5e:16x16 or 2 x v5e:16x16."""
        slices = f"{self.slices} x " if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """The number of JAX devices."""
        return self.num_chips * self.chip.devices

    @property
    def is_tpu(self) -> bool:
        return self.chip.dimensions > 1

    def place(self, device: Any) -> tuple[int, tuple[int, ...]]:
        """(slice, coordinates of the chip within it) of one of `devices`."""
        if self.is_tpu:
            return getattr(device, "slice_index", None) or 0, tuple(device.coords)[: self.chip.dimensions]
        return device.id // self.shape[0], (device.id % self.shape[0],)

    def smaller(self) -> "list[Topology]":
        """Topologies from one chip up to this one, in steps of at most 4x within a slice, then 2x in slices."""
        ones = (1,) * len(self.shape)
        count = math.prod(self.shape)
        sizes = [4**i for i in range(1, 20) if 4**i < count]
        shapes = [ones, *(_shape(self.chip, size) for size in sizes), *([self.shape] if count > 1 else [])]
        slices = [2**i for i in range(1, 20) if 2**i < self.slices] + ([self.slices] if self.slices > 1 else [])
        whole = [dataclasses.replace(self, slices=number) for number in slices]
        return [*(Topology(self.chip, shape) for shape in shapes), *whole]


def _shape(chip: Chip, count: int) -> tuple[int, ...]:
    """The shape of Google's slice with `count` chips, a power of two: 4x8, 2x2x1, 8x16x16."""
    exponent = count.bit_length() - 1
    sizes = [2 ** ((exponent + i) // chip.dimensions) for i in range(chip.dimensions)]
    return tuple(sorted(sizes, key=lambda size: (size == 1, size)))


def _slice_names(chip: Chip) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the slices whose number of chips is a power of two."""
    cores = 2 if chip.name in _NAMED_BY_CORES else 1
    counts = [2**i for i in range(20) if 2**i <= LARGEST_SLICE[chip.name] and i != 1]
    return {f"{chip.name}-{count * cores}": _shape(chip, count) for count in counts}


def known() -> str:
    """The known names, for error messages."""
    lines = []
    for chip in CHIPS.values():
        if chip.dimensions == 1:
            lines.append(f"{chip.name}-1 to -{_GPUS_PER_MACHINE} and its multiples")
        else:
            numbers = [name.rpartition("-")[2] for name in _slice_names(chip)]
            lines.append(f"{chip.name}-{'|'.join(numbers)}")
    return f"{'; '.join(lines)}; or a shape of TPU chips, as in v5e:4x8 or v4:2x2x4"


def parse(name: str, slices: int = 1) -> Topology:
    """Parses the name of a topology.

    Raises:
      UserError: it is unknown; the message lists the known ones.
    """
    found = re.fullmatch(r"(\w+)(?:-(\d+)|:(\d+(?:x\d+)*))", name.strip())
    chip = CHIPS.get(found[1]) if found else None
    if not found or not chip:
        raise UserError(f"--topology={name} is not known; known are {known()}")
    if chip.dimensions == 1:
        return _gpus(name, chip, int(found[2] or found[3]) if "x" not in (found[3] or "") else 0, slices)
    shape = tuple(map(int, found[3].split("x"))) if found[3] else _slice_names(chip).get(name.strip())
    if shape is None:
        raise UserError(f"--topology={name} is not a slice of {chip.name}; known are {known()}")
    largest = LARGEST_SLICE[chip.name]
    if len(shape) != chip.dimensions or 0 in shape or math.prod(shape) > largest:
        raise UserError(
            f"--topology={name}: a slice of {chip.name} has {chip.dimensions} dimensions and at most {largest:,} chips"
        )
    return Topology(chip, shape, slices)


def _gpus(name: str, chip: Chip, count: int, slices: int) -> Topology:
    machine = min(count, _GPUS_PER_MACHINE)
    if not count or count % machine or count > _MAX_GPUS:
        raise UserError(
            f"--topology={name}: give 1 to {_GPUS_PER_MACHINE} GPUs, or a multiple up to {_MAX_GPUS:,}, as in "
            f"{chip.name}-64"
        )
    return Topology(chip, (machine,), slices * (count // machine))


def devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for: described by libtpu for TPUs, and by JAX's CUDA plugin for GPUs.

    Without the plugin, the same number of CPU devices stand in for the GPUs.

    Raises:
      UserError: libtpu is not installed, or does not support the shape.
    """
    if not topology.is_tpu:
        return _gpu_devices(topology) if has_cuda_plugin() else _stand_ins(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('libtpu, which compiles for TPUs, is not installed: pip install -e ".[tpu]"')
    # Must be set before libtpu is loaded: do not search for a TPU on this machine, and do not fail if another process
    # has loaded libtpu.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on a real v4; libtpu's default is two
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        with quiet():
            found = topologies.get_topology_desc(name, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"libtpu does not support the topology {name}: {str(error).partition(': ')[2] or error}"
        ) from None
    return found


def has_cuda_plugin() -> bool:
    """Returns whether JAX's CUDA plugin is installed (extras cuda12 and cuda13)."""
    return any(importlib.util.find_spec(f"jax_cuda{number}_plugin") for number in (12, 13))


def _gpu_devices(topology: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    name, (count,) = topology.chip.name, topology.shape
    with quiet():
        described = topologies.get_topology_desc(
            name, platform="cuda", target_config=TARGETS[name], topology=f"1x{topology.slices}x{count}"
        )
    return described.devices


def _stand_ins(topology: Topology) -> Sequence[Any]:
    import jax

    count = topology.num_devices
    if count > _MAX_STAND_INS:
        raise UserError(
            f"{count:,} GPUs are too many for stand-in CPU devices (at most {_MAX_STAND_INS:,}): install JAX's CUDA "
            'plugin, pip install -e ".[cuda12]"'
        )
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX is initialized already, perhaps with enough devices
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"only {len(found)} CPU devices are available to stand in for the {count} GPUs of {topology.name}: remove "
            "--xla_force_host_platform_device_count from XLA_FLAGS"
        )
    return found[:count]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context that hides what the compilers write to stderr: warnings about hardware that is not present."""
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


def spanned(places: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[int, int, list[int]]:
    """(number of slices, chips per slice, extent along each dimension of a slice) that a group of places covers."""
    slices = len({number for number, _ in places})
    chips = {coordinates for _, coordinates in places}
    extents = [len(set(values)) for values in itertools.zip_longest(*chips)]
    return slices, len(chips), extents
