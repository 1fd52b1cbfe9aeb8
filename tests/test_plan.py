"""`launch.plan`: what is read from compiled programs equals hand counts; names, estimates and the record."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
from unittest.mock import Mock

import jax
import pytest
from planned_vae import DIGITS, PIXELS, VAE, kernels, num_params

from benchmarks import roofline as benchmark
from experiments import mnist_vae
from launch import plan
from launch.plans import lowering, roofline, topologies
from launch.plans.hlo import Collective
from research import chips, sharding
from research.config import MeshConfig
from research.errors import UserError
from research.training.run import Training


def _plan(tmp_path, *args):
    assert plan.run([*VAE, *args, f"--workdir={tmp_path}"]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize(
    ("name", "shape", "num_chips", "num_devices"),
    [
        ("v5e-256", (16, 16), 256, 256),
        ("v6e-8", (2, 4), 8, 8),
        ("v5p-2048", (8, 8, 16), 1024, 1024),
        ("v4-4096", (8, 16, 16), 2048, 2048),
        ("v4-8", (2, 2, 1), 4, 4),
        ("tpu7x-16", (2, 2, 2), 8, 16),
        ("v5e:4x8", (4, 8), 32, 32),
        ("h100-64", (8,), 64, 64),
        ("a100-2", (2,), 2, 2),
    ],
)
def test_names_are_what_the_vendor_means_by_them(name, shape, num_chips, num_devices):
    found = topologies.parse(name)
    assert (found.shape, found.num_chips, found.num_devices) == (shape, num_chips, num_devices)
    assert topologies.parse(name, slices=3).num_chips == 3 * num_chips


@pytest.mark.parametrize("name", ["v5e-3", "v9-8", "v5e", "v5e:4x4x4", "v5e:32x32", "v5e:0x4", "h100-12", "h100-0"])
def test_an_unknown_topology_is_refused_with_what_there_is(name):
    with pytest.raises(UserError, match=rf"--topology={name}.*(known are v4-2\||at most|multiple)"):
        topologies.parse(name)


def test_a_sweep_goes_from_one_chip_to_all():
    names = [topology.name for topology in topologies.parse("v5e:8x8", slices=4).smaller()]
    assert names == ["v5e:1x1", "v5e:2x2", "v5e:4x4", "v5e:8x8", "2 x v5e:8x8", "4 x v5e:8x8"]


def test_collectives_take_the_larger_of_bandwidth_and_latency():
    pod = topologies.parse("v5e:16x16")
    grid = [dataclasses.make_dataclass("D", ["coords", "slice_index"])((i // 16, i % 16, 0), 0) for i in range(256)]
    everyone = tuple(range(256))

    def seconds(kind, size, group=everyone, topology=pod, devices=grid):
        return roofline.collective_seconds(Collective(kind, size, group, 1), topology, devices)

    assert seconds("all-reduce", 2**30) == pytest.approx(2 * 2**30 * 255 / 256 / (4 * 50e9))
    assert seconds("all-gather", 2**30) == pytest.approx(2**30 * 255 / 256 / (4 * 50e9))
    assert seconds("all-gather", 2**30, tuple(range(16))) == pytest.approx(2**30 * 15 / 16 / (2 * 50e9))
    assert seconds("all-gather", 2**30, tuple(range(4))) == pytest.approx(2**30 * 3 / 4 / 50e9)  # no ring
    assert seconds("all-reduce", 1) == pytest.approx(2 * (8 + 8) * 1e-6)
    machines = topologies.parse("h100-16")
    gpus = [dataclasses.make_dataclass("D", ["id"])(i) for i in range(16)]
    expected = 2 * 2**30 * (7 / 8 / 450e9 + 1 / 8 * 1 / 2 / 50e9)
    assert seconds("all-reduce", 2**30, tuple(range(16)), machines, gpus) == pytest.approx(expected)


@pytest.fixture(autouse=True, scope="module")
def _no_cuda_plugin():
    """As in CI, CPU devices stand in for GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topologies, "has_cuda_plugin", lambda: False)
        yield


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep over CPU devices that stand in for GPUs, of 64 images a device in two microbatches: (folder, words)."""
    folder, words = tmp_path_factory.mktemp("sweep"), io.StringIO()
    args = ["--topology=h100-2", "--sweep_topology", "--config.model.width=512", "--config.num_epochs=3"]
    sizes = ["--config.batch_size=64", "--config.microbatch_size=32"]
    with contextlib.redirect_stdout(words):
        assert plan.run([*VAE, *args, *sizes, "--price_per_chip_hour=2", f"--workdir={folder}"]) == 0
    return folder, words.getvalue()


@pytest.mark.slow
def test_a_plan_says_what_the_step_is_made_of(sweep):
    row = json.loads((sweep[0] / "plan.json").read_text())["plans"][2]
    assert (row["topology"], row["num_chips"], row["mesh"]["data"]) == ("h100:2", 2, 2)
    assert row["num_params"] == num_params(512)
    assert row["parameter_bytes_per_chip"] == 4 * num_params(512)
    assert 0 <= row["optimizer_bytes_per_chip"] - 4 * num_params(512) < 64  # the momentum, and some scalars
    # Forward and twice backward, but for the gradient of the pixels.
    products = 64 * (6 * sum(kernels(512)) - 2 * PIXELS * 512)
    assert products < row["flops_per_chip"] < 1.2 * products  # the rest: draws, norms, the optimizer
    assert {(c["kind"], c["axis"], c["devices"], c["count"]) for c in row["collectives"]} == {
        ("all-reduce", "data", 2, 1)  # for both microbatches
    }
    sent = sum(c["bytes"] for c in row["collectives"])
    assert 0 <= sent - 4 * num_params(512) <= 4 * 16  # and some scalars
    assert row["fits"]
    assert 1437 * PIXELS < row["bytes_per_chip"] < row["chip_memory_bytes"] == 80 * 10**9


def test_its_times_are_the_terms_of_the_roofline(sweep):
    rows = json.loads((sweep[0] / "plan.json").read_text())["plans"]
    for row in rows:
        assert row["compute_seconds"] == pytest.approx(row["flops_per_chip"] / 494.7e12)
        assert row["memory_seconds"] == pytest.approx(row["bytes_accessed_per_chip"] / 3350e9)
        larger = max(row["compute_seconds"], row["memory_seconds"])
        assert row["step_seconds"] == pytest.approx(larger + row["interconnect_seconds"])
        assert row["examples_per_second"] == pytest.approx(row["batch_size"] / row["step_seconds"])
        assert row["epoch_seconds"] == pytest.approx(1437 / row["examples_per_second"])
        assert row["training_cost"] == pytest.approx(3 * row["epoch_seconds"] / 3600 * row["num_chips"] * 2)
        assert row["scaling_efficiency"] == pytest.approx(rows[0]["step_seconds"] / row["step_seconds"])
    assert rows[0]["collectives"] == []
    assert rows[2]["interconnect_seconds"] > 0


def test_a_sweep_leaves_every_plan_and_a_plot(sweep):
    folder, words = sweep
    record = json.loads((folder / "plan.json").read_text())
    rows = record.pop("plans")
    shown = [(row["num_chips"], row["strategy"], row["batch_size"], row["microbatch_size"]) for row in rows]
    assert shown == [(1, "data", 64, 32), (1, "fsdp", 64, 32), (2, "data", 128, 64), (2, "fsdp", 128, 64)]
    assert record == min(rows[2:], key=lambda row: row["step_seconds"])
    assert rows[3]["parameter_bytes_per_chip"] == pytest.approx(rows[2]["parameter_bytes_per_chip"] / 2, rel=0.01)
    assert {c["kind"] for c in rows[3]["collectives"]} == {"all-gather", "all-reduce"}
    assert (folder / "plan.png").stat().st_size > 1000
    assert len([line for line in words.splitlines() if line.startswith("| h100:")]) == 4
    assert "compiled by XLA:CPU" in words
    assert "stand in for the GPUs" in words
    assert "estimated, not measured" in words


def test_a_plan_is_of_the_mesh_that_was_asked_for():
    flags = ["--topology=h100-4", "--config.mesh.data=-1", "--config.mesh.reduce_dtype=bfloat16"]
    (found,) = plan.candidates(plan.job_lib.parse("plan", "", plan.PlanOptions(), [*VAE, *flags]))
    assert found.config.mesh == MeshConfig(data=4, reduce_dtype="bfloat16")


def test_a_search_tries_meshes_and_microbatches_and_takes_the_fastest_that_fits():
    job = plan.job_lib.parse("plan", "", plan.PlanOptions(), [*VAE, "--topology=v5e:2x2", "--search"])
    tried = {
        (c.config.mesh.data, c.config.mesh.fsdp, c.config.mesh.model, c.config.microbatch_size)
        for c in plan.candidates(job)
    }
    meshes = [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4)]
    assert tried == {(*mesh, size) for mesh in meshes for size in (0, 64, 16)}
    rows = [
        {"num_chips": chips, "fits": fits, "step_seconds": seconds}
        for chips, fits, seconds in ((4, True, 3.0), (4, False, 1.0), (4, True, 2.0), (2, True, 1.5), (8, False, None))
    ]
    assert plan.answer(rows) == rows[2]
    assert plan.answer(rows[4:]) == rows[4]


@pytest.mark.parametrize(
    ("args", "batch"),
    [
        (["--topology=h100-8"], 64),
        (["--topology=h100-24"], 64 * 24),
        (["--topology", "h100-24", "--config.batch_size", "32"], 32),
        (["--topology=h100-24", "-config.batch_size=32"], 32),
    ],
)
def test_only_a_presets_batch_that_cannot_be_shared_is_each_devices(args, batch):
    job = plan.job_lib.parse("plan", "", plan.PlanOptions(), ["experiments.cifar_cnn", *args])
    assert [one.config.batch_size for one in plan.candidates(job)] == [batch]


def test_what_does_not_fit_is_said_in_one_line_and_recorded(tmp_path, monkeypatch):
    small = dataclasses.replace(chips.CHIPS["h100"], memory_bytes=100_000)
    monkeypatch.setitem(chips.CHIPS, "h100", small)
    with pytest.raises(UserError, match=r"needs .* MiB .* h100:1, which has 97.66 KiB: try a smaller --config.micro"):
        _plan(tmp_path, "--topology=h100-1", "--config.model.width=16", "--config.batch_size=32")
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


def test_a_fault_of_the_compiler_loses_no_finished_plan(tmp_path, monkeypatch):
    def crash_at_two(lowered, workload, config, mesh):
        if mesh.size == 2:
            raise SystemExit(139)
        return lowered(workload, config, mesh)

    monkeypatch.setattr("launch.plans.lowering.lower", functools.partial(crash_at_two, lowering.lower))
    with pytest.raises(SystemExit):
        _plan(tmp_path, "--topology=h100-1,h100-2", "--config.model.width=16", "--config.batch_size=32")
    assert json.loads((tmp_path / "plan.json").read_text())["topology"] == "h100:1"


_FAULTY = """
import os, signal, sys
from experiments.mnist_vae import EXPERIMENT
from research.errors import UserError
if any(arg.startswith("--topology=a100") for arg in sys.argv):
    FAULT
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Returns a function that makes an experiment with a fault in the process that plans for an A100."""

    def make(fault):
        name = f"faulty_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(_FAULTY.replace("FAULT", fault))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        return [name, *VAE[1:], "--config.model.width=16", "--config.batch_size=32"]

    return make


@pytest.mark.slow
def test_each_kind_of_chip_has_a_process_of_its_own(faulty, tmp_path, capfd):
    """A failure of one ends no other; the command says so, and fails."""
    args = ["--topology=h100-1,a100-1,h100-2", "--price_per_chip_hour=h100=3,a100=1"]
    assert plan.run([*faulty("pass"), *args, f"--workdir={tmp_path / 'whole'}"]) == 0
    assert not capfd.readouterr().err
    whole = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert [row["topology"] for row in whole["plans"]] == ["h100:1", "h100:2", "a100:1"]
    assert [row["price_per_chip_hour"] for row in whole["plans"]] == [3, 3, 1]
    assert (tmp_path / "whole" / "plan.png").exists()

    # A plan that does not fit is no failure of its process.
    small = 'import dataclasses; from research.chips import CHIPS as c; c["a100"] = dataclasses.replace(c["a100"], '
    assert plan.run([*faulty(f"{small}memory_bytes=100)"), *args, f"--workdir={tmp_path / 'small'}"]) == 0
    assert not capfd.readouterr().err
    found = json.loads((tmp_path / "small" / "plan.json").read_text())
    assert [row["fits"] for row in found["plans"]] == [True, True, False]

    for number, (fault, line) in enumerate(
        {
            "os.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
            'raise UserError("no such data")': "exit code 2",
        }.items()
    ):
        folder = tmp_path / f"part{number}"
        assert plan.run([*faulty(fault), *args, f"--workdir={folder}"]) == 1
        said = capfd.readouterr().err
        assert said.endswith(f"error: no plan of a100-1: the process that compiled it ended with {line}\n")
        assert ("no such data" in said) == ("no such data" in fault)
        part = json.loads((folder / "plan.json").read_text())
        assert [row["flops_per_chip"] for row in part["plans"]] == [row["flops_per_chip"] for row in whole["plans"][:2]]


def test_a_process_plans_the_topologies_as_they_were_given(tmp_path, monkeypatch):
    """Names of GPUs on several machines, and slices."""
    calls = []
    monkeypatch.setattr(plan.isolation, "plan_in_subprocess", lambda *args: calls.append(args) or [])
    flags = ["--topology=h100-8,v5e:2x2,h100-16", "--slices=2", "--config.batch_size=64", "--config.model.width=16"]
    monkeypatch.setattr(plan, "_shardable", lambda planner, wanted: wanted)
    monkeypatch.setattr("launch.plans.planner.Planner", lambda *_: Mock(workload=Mock(num_examples=1437)))
    assert plan.run([*VAE, *flags, f"--workdir={tmp_path}"]) == 1
    args = [VAE[0], *VAE[1:], *flags[2:]]
    assert [(list(given), *rest) for given, *rest in calls] == [
        (args, ["h100-8", "h100-16"], 2, tmp_path / "h100"),
        (args, ["v5e:2x2"], 2, tmp_path / "v5e"),
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give --topology=NAME, one of"),
        (["--topology=h100-99999992"], "or a multiple up to 131,072"),
        (["--topology=h100-4096"], "at most 2,048"),
        (["--topology=h100-8", "--config.batch_size=12"], "batch_size=12 cannot be split evenly over 8 devices"),
        (["--topology=h100-8", "--config.mesh.fsdp=3"], "must multiply to the 8 devices"),
        (["--topology=h100-8,h100-4", "--search"], "--search takes one --topology"),
        (["--topology=h100-8", "--sweep_topology", "--search"], "exclude each other"),
        (["--topology=h100-8", "--search", "--config.mesh.fsdp=2"], "--search chooses the mesh: leave"),
        (["--topology=h100-8", "--sweep_topology", "--config.mesh.data=1"], "must multiply to the 8 devices"),
        (["--topology=h100-8", "--search", "--config.batch_size=12"], "use a multiple of 8"),
        (["--topology=h100-64", "--config.batch_size=64"], "only 8 CPU devices"),
    ],
)
def test_impossible_flags_are_named_before_anything_is_compiled(args, words, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.plans.lowering.load", None)  # no data is loaded
    with pytest.raises(UserError, match=words):
        plan.run([*VAE, *args, f"--workdir={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("workdir", "words"),
    [("file/x", "file/x cannot be created: Not a directory"), ("gs://b/x", "must be on a local disk")],
)
def test_a_record_that_cannot_be_kept_is_named_before_anything_is_compiled(workdir, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("launch.plans.lowering.lower", None)
    with pytest.raises(UserError, match=words):
        plan.run([*VAE, "--topology=h100-2", "--config.batch_size=32", f"--workdir={workdir}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_libtpu_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[tpu\]"'):
        plan.run([*VAE, "--topology=v5e-4", f"--workdir={tmp_path}"])


@pytest.mark.slow
def test_the_benchmark_compares_a_prediction_with_a_measurement():
    machine = benchmark.speeds(size=128, count=2**16)
    assert min(machine.values()) > 0
    args = (*DIGITS, "--config.model.width=16", "--config.batch_size=64")
    row = benchmark.row("mnist_vae", "default", {"flops": 1e9, "bytes": 1e9}, args)
    assert row["predicted_seconds"] == pytest.approx(max(row["gflop"], row["megabytes"] / 1e3))
    assert row["ratio"] == row["measured_seconds"] / row["predicted_seconds"]


def test_a_run_compiles_what_was_planned():
    """The same number of steps a dispatch where the batch size does not divide the data set: epochs of 2 and 3."""
    config = mnist_vae.EXPERIMENT.presets["default"]()
    config.batch_size, config.num_epochs, config.dataset.name = 512, 2, "digits"
    workload = lowering.load(mnist_vae.EXPERIMENT, config, MeshConfig(data=1))
    mesh = sharding.make_mesh(workload.config, jax.devices()[:1])
    lowered, _ = lowering.lower(workload, workload.config, mesh)
    run = Training(workload.config, workload.task, workload.dataset, mesh)
    assert run.epoch_end_steps == [2, 5]
    inputs = lowered.in_avals[0][2].index
    assert inputs.shape == run._train_batches.example().index.shape == (3, 1, 512)


@pytest.mark.parametrize(
    ("mesh", "found"),
    [
        (
            ["--config.mesh.data=-1"],
            [(1, "data", (1, 1, 1), 32), (4, "data", (4, 1, 1), 128), (8, "data", (8, 1, 1), 256)],
        ),
        (["--config.mesh.fsdp=2"], [(4, "data x fsdp", (2, 2, 1), 128), (8, "data x fsdp", (4, 2, 1), 256)]),
        (["--config.mesh.model=2"], [(4, "data x model", (2, 1, 2), 64), (8, "data x model", (4, 1, 2), 128)]),
    ],
)
def test_a_sweep_with_a_given_mesh_has_every_size_that_it_fits(mesh, found):
    """Only with that mesh, even if it is the default."""
    args = [*VAE, "--topology=h100-8", "--sweep_topology", "--config.batch_size=32", *mesh]
    job = plan.job_lib.parse("plan", "", plan.PlanOptions(), args)
    assert [
        (one.topology.num_chips, one.strategy, (m.data, m.fsdp, m.model), one.config.batch_size)
        for one in plan.candidates(job)
        for m in [one.config.mesh]
    ] == found


def test_a_sweep_has_the_mesh_of_a_preset():
    args = [*VAE, "--topology=h100-8", "--sweep_topology"]
    job = plan.job_lib.parse("plan", "", plan.PlanOptions(), args)
    job.config.mesh = MeshConfig(data=1, fsdp=-1)
    assert [(one.strategy, one.config.mesh.fsdp) for one in plan.candidates(job)] == [("fsdp", n) for n in (1, 4, 8)]


def test_a_batch_larger_than_the_training_set_is_not_planned(tmp_path, capsys):
    with pytest.raises(UserError, match=r"a batch of \d,\d+ exceeds the training set of 1,437 examples; lower it"):
        _plan(tmp_path, "--topology=h100-6")
    rows = _plan(tmp_path, "--topology=h100-4", "--sweep_topology", "--config.batch_size=512")["plans"]
    assert {row["batch_size"] for row in rows} == {512}
    assert "skipped 2 of 4 plans, whose batch exceeds the 1,437 training examples" in capsys.readouterr().out


@pytest.mark.slow
def test_rematerialization_is_planned(tmp_path):
    plain, remat = (
        _plan(tmp_path / mode, "--topology=h100-1", "--config.model.width=64", f"--config.remat={mode}")
        for mode in ("none", "blocks")
    )
    assert remat["flops_per_chip"] > 1.1 * plain["flops_per_chip"]
