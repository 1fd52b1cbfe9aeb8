"""Plans a run on hardware that is not available here: memory, FLOPs, collectives and an estimate of the step time.

python -m launch.plan experiments.cifar_cnn --topology=v5e:16x16 [--price_per_chip_hour=1.2] [flags of the experiment]
python -m launch.plan experiments.cifar_cnn --topology=h100-8,v5e-16,v6e-16 --price_per_chip_hour=h100=3,v5e=1.2,v6e=2.7
python -m launch.plan experiments.cifar_cnn --topology=v4-4096 --sweep_topology     from one chip to the topology
python -m launch.plan experiments.cifar_cnn --topology=v5e:4x4 --search             the fastest mesh that fits

The train step is compiled ahead of time, on any machine: for TPUs by libtpu (extra "tpu"), for GPUs by JAX's CUDA
plugin (extra "cuda12" or "cuda13") or, without the plugin, by XLA:CPU for the same number of devices. Memory, FLOPs and
collectives are read from the compiled program. Times are estimates from the vendors' specifications
(`research/chips.py`). With --sweep_topology, `batch_size` and `microbatch_size` are per device (devices along the axes
`sequence` and `model` share a batch). So is the default batch size if it cannot be split evenly over the devices. A set
of images whose size is known (`plans/known_datasets.py`) need not be on disk. The workdir gets `plan.json`, and
`plan.png` for several plans.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import job as job_lib
from launch.job import Job
from launch.plans import isolation, report, topologies
from launch.plans.prices import parse_prices
from launch.plans.topologies import Topology
from research.config import MeshConfig, option
from research.errors import UserError
from research.record import drawing, storage


@dataclasses.dataclass
class PlanOptions:
    """The flags of `launch.plan`."""

    topology: str = option(
        "", "TPU slices or GPUs, by name or shape, separated by commas: v5e:16x16, v5p-2048, h100-64"
    )
    slices: int = option(1, "number of slices of each topology, connected by the data center network", minimum=1)
    sweep_topology: bool = option(
        False,
        "plan sizes from one chip to the topology, with the --config.mesh that is given, else with data parallelism "
        "and with FSDP",
    )
    search: bool = option(False, "plan several meshes and microbatch sizes, and report the fastest that fits")
    price_per_chip_hour: str = option(
        "", "if given, print costs: a price for all chips, or one for each kind, as in h100=3,v5e=1.2"
    )
    decoded_per_vcpu: int = option(
        400, "images per second that a vCPU of the hosts decodes, as benchmarks.input measures it", minimum=1
    )


_STRATEGIES = (MeshConfig(), MeshConfig(data=1, fsdp=-1))  # data parallelism and FSDP, of a sweep


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One program to compile: a topology, and the experiment's config with the batch and mesh sizes for it.

    Attributes:
      topology: the hardware.
      config: the experiment's config.
      strategy: of a sweep: the mesh axes that it uses.
      name: the topology as --topology has it.
    """

    topology: Topology
    config: Any
    strategy: str = ""
    name: str = ""


def _with(config: Any, mesh: MeshConfig, factor: int = 1, microbatch_size: int | None = None) -> Any:
    """A copy of the config with this mesh, and its batch and microbatch sizes times a factor."""
    changed = copy.deepcopy(config)
    changed.mesh = mesh
    changed.batch_size *= factor
    changed.microbatch_size = config.microbatch_size * factor if microbatch_size is None else microbatch_size
    return changed


def candidates(job: Job) -> list[Candidate]:
    """The programs to compile.

    Raises:
      UserError: a topology is unknown, or the mesh or the batch size does not fit it.
    """
    from research import sharding

    options, config = job.options, job.config
    if not options.topology:
        raise UserError(f"give --topology=NAME, one of {topologies.known()}")
    names = options.topology.split(",")
    found = [topologies.parse(name, options.slices) for name in names]
    if options.sweep_topology and options.search:
        raise UserError("--sweep_topology and --search exclude each other: give one of them")
    if options.sweep_topology or options.search:
        flag = "--sweep_topology" if options.sweep_topology else "--search"
        if len(found) > 1:
            raise UserError(f"{flag} takes one --topology, not several")
    if options.sweep_topology:
        has_mesh = config.mesh != MeshConfig() or any(name.startswith("config.mesh.") for name in job.given)
        return list(_sweep(found[0], config, [config.mesh] if has_mesh else _STRATEGIES))
    if options.search:
        if config.mesh != MeshConfig():
            raise UserError("--search chooses the mesh: leave --config.mesh out")
        return list(_search(found[0], config))
    meshes = [
        MeshConfig(*sharding.mesh_shape(config.mesh, topology.num_devices), config.mesh.reduce_dtype)
        for topology in found
    ]
    return [
        Candidate(topology, _with(config, mesh, _factor(job, mesh)), name=name)
        for name, topology, mesh in zip(names, found, meshes)
    ]


def _factor(job: Job, mesh: MeshConfig) -> int:
    """The factor for the batch size: a default that cannot be split over the devices is taken to be per device."""
    shards = mesh.data * mesh.fsdp
    return 1 if "config.batch_size" in job.given or job.config.batch_size % shards == 0 else shards


def _sweep(topology: Topology, config: Any, meshes: Sequence[MeshConfig]) -> Iterator[Candidate]:
    """Yields the plans of each size for each mesh that fits it, with batches in proportion."""
    from research import sharding

    for smaller in topology.smaller():
        for mesh in meshes:
            try:
                sizes = sharding.mesh_shape(mesh, smaller.num_devices)
            except UserError:
                if smaller == topology:
                    raise
                continue
            shards = sizes[0] * sizes[1]
            name = " x ".join(axis for axis in sharding.AXES if getattr(mesh, axis) != 1)
            yield Candidate(smaller, _with(config, MeshConfig(*sizes, mesh.reduce_dtype), shards), name)


def _search(topology: Topology, config: Any) -> Iterator[Candidate]:
    count = topology.num_devices
    sizes = sorted({1, count, *(4**i for i in range(1, 10) if count % 4**i == 0)})
    meshes = [MeshConfig(data=count // size, fsdp=size) for size in sizes]
    meshes += [MeshConfig(data=count // size, model=size) for size in (2, 4) if count % size == 0]
    for mesh in meshes:
        shards = mesh.data * mesh.fsdp
        for parts in (1, 4, 16):
            if config.batch_size % (parts * shards) == 0:
                yield Candidate(topology, _with(config, mesh, 1, config.batch_size // parts if parts > 1 else 0))
    if config.batch_size % count:
        raise UserError(
            f"--config.batch_size={config.batch_size} cannot be split over {count} devices: use a multiple of {count}"
        )


def answer(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row at the top level of plan.json: the fastest of those that fit on the most chips."""
    fitting = [row for row in rows if row["fits"]] or rows[-1:]
    most = [row for row in fitting if row["num_chips"] == max(row["num_chips"] for row in fitting)]
    return min(most, key=lambda row: row["step_seconds"] or 0.0)


def _possible(wanted: Sequence[Candidate], num_examples: int) -> list[Candidate]:
    """Drops the candidates whose batch size exceeds the training set, which a run would reject."""
    found = [one for one in wanted if one.config.batch_size <= num_examples]
    if not found:
        least = min(one.config.batch_size for one in wanted)
        raise UserError(
            f"--config.batch_size: a batch of {least:,} exceeds the training set of {num_examples:,} examples; lower it"
        )
    if left_out := len(wanted) - len(found):
        print(f"skipped {left_out} of {len(wanted)} plans, whose batch exceeds the {num_examples:,} training examples")
    return found


def _shardable(planner: Any, wanted: Sequence[Candidate]) -> list[Candidate]:
    """Drops the candidates whose mesh the experiment's sharding rules do not fit; raises the error if none is left."""
    found, errors = [], []
    for one in wanted:
        try:
            planner.check_sharding(one.topology, one.config)
            found.append(one)
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if errors:
        print(f"skipped {len(errors)} of {len(wanted)} plans, whose meshes the experiment's sharding rules do not fit")
    return found


def _write(workdir: Path, rows: Sequence[dict[str, Any]], has_several: bool) -> None:
    """Writes plan.json, with all rows if several are planned."""
    record = answer(rows) | ({"plans": list(rows)} if has_several else {})
    storage.replace(workdir / "plan.json", (json.dumps(record, indent=2) + "\n").encode())


def _plot(workdir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes plan.png."""
    from research import plots

    drawing.save(workdir / "plan.png", lambda: plots.plan(rows))


def _planned(planner: Any, job: Job, wanted: Sequence[Candidate], workdir: Path) -> Iterator[dict[str, Any]]:
    """Compiles the programs; those of several kinds of chips in a process for each kind, in a folder of its name."""
    kinds = dict.fromkeys(one.topology.chip.name for one in wanted)
    if len(kinds) == 1:
        for one in wanted:
            yield planner.row(one.topology, one.config) | ({"strategy": one.strategy} if one.strategy else {})
        return
    for kind in kinds:
        names = [one.name for one in wanted if one.topology.chip.name == kind]
        args = [job.module, *job.args]
        yield from isolation.plan_in_subprocess(args, names, job.options.slices, workdir / kind)


def _rows(
    planner: Any, job: Job, wanted: Sequence[Candidate], prices: Mapping[str, float], workdir: Path
) -> list[dict[str, Any]]:
    """Plans; writes plan.json after each program or kind of chip, and prints a table if there are several plans."""
    rows: list[dict[str, Any]] = []
    if len(wanted) > 1:
        print(report.table_head(costs=bool(prices)), flush=True)
    for row in _planned(planner, job, wanted, workdir):
        row |= report.cost(row, prices)
        if planner.workload.decodes_images:
            row |= report.host(row, job.options.decoded_per_vcpu)
        rows.append(row)
        # Written after each program: compilation may take minutes, and a compiler's crash ends its process.
        _write(workdir, rows, len(wanted) > 1)
        if len(wanted) > 1:
            print(report.table_row(row, costs=bool(prices)), flush=True)
    if len(wanted) > 1 and planner.workload.decodes_images:
        print(*(report.input_line(row) for row in rows if "host_vcpus_per_chip" in row), sep="\n")
    return rows


def run(argv: Sequence[str]) -> int:
    """Compiles and reports the plans; returns the exit code.

    Raises:
      UserError: bad input, found before anything is compiled; or no plan fits in memory, which plan.json records too.
    """
    job = job_lib.parse("plan", str(__doc__), PlanOptions(), argv)
    options, wanted = job.options, candidates(job)
    prices = parse_prices(options.price_per_chip_hour, [one.topology.chip.name for one in wanted])
    import jax

    from research.process import backend

    jax.config.update("jax_platforms", "cpu")
    backend.check_xla_flags()
    from launch.plans.planner import Planner

    began = time.monotonic()
    planner = Planner(job.experiment, job.config, [(one.topology, one.config) for one in wanted])
    wanted = _shardable(planner, _possible(wanted, planner.workload.num_examples))
    workdir = job_lib.make_folder(job.workdir)
    print(report.first_line(job.experiment.name, planner.workload, len(wanted)), flush=True)
    if not options.sweep_topology and any(one.config.batch_size != job.config.batch_size for one in wanted):
        print(
            f"batch_size={job.config.batch_size} is per device here; give --config.batch_size=N for a global batch size"
        )
    rows = _rows(planner, job, wanted, prices, workdir)
    if not rows:
        return 1
    chosen = answer(rows)
    if len(rows) > 1 and not options.search and any(row["fits"] for row in rows):
        _plot(workdir, rows)
    if not chosen["fits"]:
        raise UserError(f"{report.too_large(chosen)} (record: {workdir})")
    if options.search:
        print(f"fastest of {len(rows)} plans that fits: {report.flags(chosen)}")
    print(report.report(chosen))
    print(f"{time.monotonic() - began:.0f} s; record: {workdir}")
    return 0 if len(rows) == len(wanted) else 1


if __name__ == "__main__":
    job_lib.main(run)
