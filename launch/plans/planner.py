"""Compiles the train step for each topology, and derives the plan from the compiled program."""

import contextlib
import copy
import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
from flax import nnx

from launch.plans import hlo, lowering, topologies
from launch.plans.roofline import Roofline, roofline
from launch.plans.topologies import Topology
from research import sharding, sharding_rules
from research.config import Config, MeshConfig
from research.experiment import Experiment
from research.training.state import TrainState, num_params

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step.

    Attributes:
      state: shapes and shardings of the train state.
      program: the compiled program; None if it does not fit in memory.
      bytes_per_device: peak memory of the program, or an estimate if it does not fit.
      seconds: the compilation time.
    """

    state: TrainState
    program: hlo.Program | None
    bytes_per_device: int
    seconds: float


class Planner:
    """Compiles the train step of one experiment for several topologies.

    Args:
      experiment: the experiment.
      config: its unresolved config.
      wanted: the topologies, each with the experiment's config for it (batch and mesh sizes).

    Raises:
      UserError: libtpu is missing, a mesh or batch does not fit its topology, or the data set is not available.
    """

    def __init__(self, experiment: Experiment, config: Config, wanted: Sequence[tuple[Topology, Any]]):
        self._devices: dict[Topology, Sequence[Any]] = {}
        # The number of CPU devices that stand in for GPUs can be set only once, so the largest topology comes first.
        for topology, own_config in sorted(wanted, key=lambda pair: (pair[0].is_tpu, -pair[0].num_devices)):
            sharding.make_mesh(own_config, self._devices_of(topology))
        same_mesh = len({str(config.mesh) for _, config in wanted}) == 1
        self.workload = lowering.load(experiment, config, wanted[0][1].mesh if same_mesh else MeshConfig(data=1))
        self._programs: dict[Any, Compiled] = {}

    def _devices_of(self, topology: Topology) -> Sequence[Any]:
        if topology not in self._devices:
            self._devices[topology] = topologies.devices(topology)
        return self._devices[topology]

    def check_sharding(self, topology: Topology, config: Any) -> None:
        """Raises `UserError` if the experiment's sharding rules do not fit the mesh of a program."""
        if rules := self.workload.task.sharding_rules:
            sharding_rules.check(rules, self._params, sharding.make_mesh(config, self._devices_of(topology)))

    @functools.cached_property
    def _params(self) -> nnx.State:
        """The shapes of the parameters."""
        network = nnx.eval_shape(lambda: self.workload.task.create_model(nnx.Rngs(0)))
        return nnx.state(network, nnx.Param)

    def row(self, topology: Topology, config: Any) -> dict[str, Any]:
        """The entry of one program in plan.json."""
        config = self._resolved(config)
        mesh = sharding.make_mesh(config, self._devices_of(topology))
        compiled = self._compile(topology, config, mesh)
        chip = topology.chip
        state_bytes = {
            f"{name}_bytes_per_chip": sharding.bytes_per_device(tree) * chip.devices
            for name, tree in (("parameter", compiled.state.all_params), ("optimizer", compiled.state.opt_state))
        }
        bytes_per_chip = (compiled.bytes_per_device + self.workload.evaluation_bytes) * chip.devices
        row = {
            "topology": topology.name,
            "chip": chip.name,
            "num_chips": topology.num_chips,
            "mesh": dict(mesh.shape),
            "batch_size": config.batch_size,
            "microbatch_size": config.microbatch_size,
            "num_params": num_params(compiled.state),
            **state_bytes,
            "fits": compiled.program is not None and bytes_per_chip <= chip.memory_bytes,
            "bytes_per_chip": bytes_per_chip,
            "chip_memory_bytes": chip.memory_bytes,
            "compiler": _compiler(mesh),
            "compile_seconds": compiled.seconds,
            "chip_source": chip.source,
        }
        return row | self._estimates(topology, config, mesh, compiled.program)

    def _estimates(
        self, topology: Topology, config: Any, mesh: jax.sharding.Mesh, program: hlo.Program | None
    ) -> dict[str, Any]:
        """Costs, collectives and times; all None if the program does not fit in memory."""
        names = (
            "flops_per_chip bytes_accessed_per_chip collectives compute_seconds memory_seconds interconnect_seconds "
            "step_seconds examples_per_second scaling_efficiency epoch_seconds training_seconds"
        )
        if program is None:
            return dict.fromkeys(names.split())
        times, flops, moved, found = self._times(topology, config, mesh, program)
        shape = dict(mesh.shape)
        baseline = times if mesh.size == 1 else self._baseline(topology, config, mesh)
        share = config.batch_size // (shape["data"] * shape["fsdp"])
        ideal = baseline.step * config.batch_size / share / mesh.size if baseline else None
        collectives = [
            {
                "kind": one.kind,
                "bytes": one.bytes,
                "axis": "slices" if one.slices else hlo.axes_of(one.group, shape),
                "devices": one.slices or len(one.group),
                "count": one.count,
            }
            for one in found
        ]
        rate = config.batch_size / times.step
        values = (flops, moved, collectives, times.compute, times.memory, times.interconnect, times.step, rate)
        efficiency = ideal / times.step if ideal else None
        epoch = self.workload.num_examples / rate
        training = config.num_steps * times.step if config.num_steps else config.num_epochs * epoch
        return dict(zip(names.split(), (*values, efficiency, epoch, training)))

    def _times(
        self, topology: Topology, config: Any, mesh: jax.sharding.Mesh, program: hlo.Program
    ) -> tuple[Roofline, float, float, list[hlo.Collective]]:
        cost = program.cost()
        flops, moved = (cost[key] * topology.chip.devices for key in ("flops", "bytes accessed"))
        found = program.collectives()
        dtype = getattr(getattr(config, "model", None), "dtype", "float32")
        return roofline(topology, dtype, flops, moved, found, list(mesh.devices.flat)), flops, moved, found

    def _baseline(self, topology: Topology, config: Any, mesh: jax.sharding.Mesh) -> Roofline | None:
        """The roofline of a single device with its share of the batch; None if that does not fit in memory."""
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        share = copy.deepcopy(config)
        share.mesh = MeshConfig(data=1)
        share.batch_size, share.microbatch_size = config.batch_size // shards, config.microbatch_size // shards
        one_chip = Topology(topology.chip, (1,) * len(topology.shape))
        one_device = sharding.make_mesh(share, self._devices_of(one_chip)[:1])
        program = self._compile(one_chip, share, one_device).program
        return self._times(one_chip, share, one_device, program)[0] if program else None

    def _resolved(self, config: Any) -> Any:
        """The workload's resolved config with the batch and mesh sizes of `config`."""
        resolved = copy.deepcopy(self.workload.config)
        resolved.mesh, resolved.batch_size = config.mesh, config.batch_size
        resolved.microbatch_size = config.microbatch_size
        return resolved

    def _compile(self, topology: Topology, config: Any, mesh: jax.sharding.Mesh) -> Compiled:
        key = topology, *mesh.shape.values(), config.batch_size, config.microbatch_size
        if key not in self._programs:
            self._programs[key] = self._compile_uncached(config, mesh)
        return self._programs[key]

    def _compile_uncached(self, config: Any, mesh: jax.sharding.Mesh) -> Compiled:
        lowered, state = lowering.lower(self.workload, config, mesh)
        began = time.monotonic()
        quiet = contextlib.nullcontext() if mesh.devices.flat[0].platform == "cpu" else topologies.quiet()
        try:
            with quiet:
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", str(error))
            temporaries = float(found[1]) * _UNITS[found[2]] if found else 0.0
            return Compiled(
                state, None, round(temporaries) + sharding.bytes_per_device(state), time.monotonic() - began
            )
        seconds = time.monotonic() - began
        memory: Any = compiled.memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        size += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        return Compiled(state, hlo.Program(compiled.as_text() or ""), size, seconds)


def _compiler(mesh: jax.sharding.Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    names = {"tpu": ("libtpu", "libtpu"), "cpu": ("XLA:CPU of jaxlib", "jaxlib")}
    name, package = names.get(platform, ("XLA:GPU of jaxlib", "jaxlib"))
    return f"{name} {version(package)}"
