"""What an experiment would need and do on hardware that is not here, by the vendor's compiler.

python -m launch.plan experiments.cifar_cnn --topology=v5e:16x16 [--price_per_chip_hour=1.2] [flags of the experiment]
python -m launch.plan experiments.cifar_cnn --topology=v5e-256,v5p-512,v6e-256
python -m launch.plan experiments.cifar_cnn --topology=v4-4096 --sweep_topology     from one chip to all of these
python -m launch.plan experiments.cifar_cnn --topology=v5e:4x4 --search             the fastest mesh that fits

The train step is compiled ahead of time, on any machine: for TPUs by libtpu (extra "tpu"), for GPUs by JAX's CUDA
plugin (extra "cuda12" or "cuda13"), and without that by XLA's CPU compiler for as many devices. Memory, FLOPs and
collectives are read from the compiled program; times are estimates from the vendors' figures (`plans/chips.py`). In a
sweep `batch_size` and `microbatch_size` are a device's, and so is a preset's batch that the devices cannot share.
`plan.json`, and `plan.png` where there are several, go to the workdir.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import job as job_lib
from launch.job import Job
from launch.plans import report, topologies
from launch.plans.topologies import Topology
from research.config import MeshConfig, option
from research.errors import UserError
from research.record import storage


@dataclasses.dataclass
class PlanOptions:
    """What `launch.plan` can be told."""

    topology: str = option(
        "", "slices or machines, by name or shape, separated by commas: v5e:16x16, v5p-2048, h100-64"
    )
    slices: int = option(1, "slices of each, joined by the slower network", minimum=1)
    sweep_topology: bool = option(False, "from one chip to the topology, by data parallelism and by fsdp")
    search: bool = option(False, "try microbatch and mesh shapes, and name the fastest that fits")
    price_per_chip_hour: float = option(0.0, "to be shown as the cost of an epoch and of the training", minimum=0)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One program to be compiled: an experiment's config, its batch and mesh filled in, on a topology."""

    topology: Topology
    config: Any
    strategy: str = ""


def _with(config: Any, mesh: MeshConfig, factor: int = 1, microbatch_size: int | None = None) -> Any:
    """The config with a mesh of known sizes, and its batch times a factor."""
    changed = copy.deepcopy(config)
    changed.mesh = mesh
    changed.batch_size *= factor
    changed.microbatch_size = config.microbatch_size * factor if microbatch_size is None else microbatch_size
    return changed


def candidates(job: Job) -> list[Candidate]:
    """What the command line asks for.

    Raises:
      UserError: a topology is not known, or the mesh or the batch does not suit it.
    """
    from research import sharding

    options, config = job.options, job.config
    if not options.topology:
        raise UserError(f"give --topology=NAME; known are {topologies.known()}")
    found = [topologies.parse(name, options.slices) for name in options.topology.split(",")]
    if options.sweep_topology and options.search:
        raise UserError("--sweep_topology and --search: give one of them")
    if options.sweep_topology or options.search:
        flag = "--sweep_topology" if options.sweep_topology else "--search"
        if len(found) > 1:
            raise UserError(f"{flag}: give one topology")
        if config.mesh != MeshConfig():
            raise UserError(f"{flag} chooses the mesh: leave --config.mesh out")
    if options.sweep_topology:
        return list(_sweep(found[0], config))
    if options.search:
        return list(_search(found[0], config))
    meshes = [
        MeshConfig(*sharding.mesh_shape(config.mesh, topology.num_devices), config.mesh.reduce_dtype)
        for topology in found
    ]
    return [Candidate(topology, _with(config, mesh, _factor(job, mesh))) for topology, mesh in zip(found, meshes)]


def _factor(job: Job, mesh: MeshConfig) -> int:
    """By how much the batch is to grow: a preset's that the devices cannot share becomes each one's."""
    shards = mesh.data * mesh.fsdp
    return 1 if "config.batch_size" in job.given or job.config.batch_size % shards == 0 else shards


def _sweep(topology: Topology, config: Any) -> Iterator[Candidate]:
    for smaller in topology.smaller():
        count = smaller.num_devices
        meshes = {"data": MeshConfig(data=count), "fsdp": MeshConfig(data=1, fsdp=count)}
        for strategy, mesh in meshes.items():
            yield Candidate(smaller, _with(config, mesh, count), strategy)


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
            f"--config.batch_size={config.batch_size} cannot be shared by {count} devices: use a multiple of {count}"
        )


def answer(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that plan.json begins with: of those that fit and have the most chips, the fastest."""
    fitting = [row for row in rows if row["fits"]] or rows[-1:]
    most = [row for row in fitting if row["num_chips"] == max(row["num_chips"] for row in fitting)]
    return min(most, key=lambda row: row["step_seconds"] or 0.0)


def _possible(wanted: Sequence[Candidate], num_examples: int) -> list[Candidate]:
    """Those whose steps take no more examples than there are, which a run would refuse."""
    found = [one for one in wanted if one.config.batch_size <= num_examples]
    if not found:
        least = min(one.config.batch_size for one in wanted)
        raise UserError(
            f"--config.batch_size: steps of {least:,} examples, and the training set has {num_examples:,}; lower it"
        )
    if left_out := len(wanted) - len(found):
        print(f"left out: {left_out} of {len(wanted)}, whose steps take more than the {num_examples:,} examples")
    return found


def _write(workdir: Path, rows: Sequence[dict[str, Any]], options: PlanOptions) -> dict[str, Any]:
    """Leaves plan.json and plan.png; returns the row that answers the question."""
    chosen = answer(rows)
    record = chosen | ({"plans": list(rows)} if len(rows) > 1 else {})
    storage.replace(workdir / "plan.json", (json.dumps(record, indent=2) + "\n").encode())
    if len(rows) > 1 and not options.search and any(row["fits"] for row in rows):
        from research import plots

        plots.plan(rows).savefig(workdir / "plan.png", dpi=120)
    return chosen


def run(argv: Sequence[str]) -> int:
    """Plans what the command line says.

    Raises:
      UserError: bad input, found before anything is compiled; or nothing that was asked for fits its memory, which
        plan.json says too.
    """
    job = job_lib.parse("plan", str(__doc__), PlanOptions(), argv)
    options, wanted = job.options, candidates(job)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from launch.plans.planner import Planner

    began = time.monotonic()
    planner = Planner(job.experiment, job.config, [(one.topology, one.config) for one in wanted])
    wanted = _possible(wanted, planner.workload.num_examples)
    workdir = job_lib.make_folder(job.workdir)
    print(report.first_line(job.experiment.name, planner.workload, len(wanted)), flush=True)
    if not options.sweep_topology and any(one.config.batch_size != job.config.batch_size for one in wanted):
        print(f"batch_size={job.config.batch_size} is each device's here; --config.batch_size=N is for all of them")
    rows = []
    if len(wanted) > 1:
        print(report.table_head(), flush=True)
    for one in wanted:
        row = planner.row(one.topology, one.config) | ({"strategy": one.strategy} if one.strategy else {})
        rows.append(row | report.price(row, options.price_per_chip_hour, one.config.num_epochs))
        if len(wanted) > 1:
            print(report.table_row(rows[-1]), flush=True)
    chosen = _write(workdir, rows, options)
    if not chosen["fits"]:
        raise UserError(f"{report.too_large(chosen)} (record: {workdir})")
    if options.search:
        print(f"the fastest that fits, of {len(rows)}: {report.flags(chosen)}")
    print(report.report(chosen))
    print(f"{time.monotonic() - began:.0f} s; record: {workdir}")
    return 0


if __name__ == "__main__":
    job_lib.main(run)
