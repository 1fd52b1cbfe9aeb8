"""`launch.plan` with the compilers of TPUs and GPUs, without either."""

import json
import os
import subprocess
import sys

import pytest
from planned_vae import PIXELS, VAE, kernels, num_params

from launch.plans import topologies

# libtpu is loaded in a process of its own, by one command after the other.
SCRIPT = """
import json, sys
from launch import plan
from research.errors import UserError
for args in json.loads(sys.argv[1]):
    try:
        plan.run(args)
    except UserError as error:
        print("error:", error)
"""


@pytest.fixture(scope="module")
def tpu(tmp_path_factory):
    """Plans with libtpu's compiler; returns the folder of the records, and everything printed on both streams."""
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    folder = tmp_path_factory.mktemp("tpu")
    sweep = ["--topology=v5e:2x2", "--sweep_topology", "--config.model.width=1024", "--config.batch_size=64"]
    commands = [
        [*VAE, *sweep, f"--workdir={folder}/sweep"],
        [*VAE, "--topology=v5e:2x2", "--config.model.width=3000000", "--config.batch_size=64", f"--workdir={folder}/x"],
        [*VAE, "--topology=v5e:3x5", "--config.batch_size=60", f"--workdir={folder}/y"],
    ]
    recurrence = ["experiments.char_rnn", "--config=lru", "--config.dataset.name=pydoc", "--config.model.width=256"]
    recurrence += ["--config.model.layers=1", "--config.sequence_length=1024", "--config.batch_size=8"]
    fsdp = ["--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4", f"--workdir={folder}/lru"]
    commands.append([*recurrence, *fsdp])
    args = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder, done


def _record(folder, name):
    return json.loads((folder / name / "plan.json").read_text())


def test_libtpu_makes_one_all_reduce_of_data_parallelism(tpu):
    row = _record(tpu[0], "sweep")["plans"][2]
    assert (row["topology"], row["mesh"]["data"], row["batch_size"]) == ("v5e:2x2", 4, 256)
    gradients, *others = row["collectives"]
    assert (gradients["kind"], gradients["axis"], gradients["devices"], gradients["count"]) == (
        "all-reduce",
        "data",
        4,
        1,
    )
    assert 0 <= gradients["bytes"] - 4 * num_params(1024) <= 4 * 16
    assert sum(c["bytes"] for c in others) <= 4 * 16  # scalars: the metrics
    assert row["flops_per_chip"] == pytest.approx(64 * (6 * sum(kernels(1024)) - 2 * PIXELS * 1024), rel=0.1)


def test_libtpu_gathers_and_scatters_for_fsdp(tpu):
    row = _record(tpu[0], "sweep")["plans"][3]
    assert row["mesh"]["fsdp"] == 4
    assert row["parameter_bytes_per_chip"] == pytest.approx(num_params(1024), rel=0.01)  # a quarter, of 4 bytes each
    by_kind = {kind: [c for c in row["collectives"] if c["kind"] == kind] for kind in ("reduce-scatter", "all-reduce")}
    scattered = sum(c["bytes"] for c in by_kind["reduce-scatter"])
    assert scattered == pytest.approx(4 * sum(kernels(1024)), rel=0.02)
    assert sum(c["bytes"] for c in by_kind["all-reduce"]) < 0.05 * scattered
    gathered = sum(c["bytes"] * c["count"] for c in row["collectives"] if c["kind"] == "all-gather")
    assert gathered == pytest.approx(4 * sum(kernels(1024)), rel=0.05)  # the biases are small


def test_no_step_of_a_recurrence_collects_a_sharded_constant(tpu):
    """Its decay is a function of parameters that fsdp shards, and is gathered before the loop over time."""
    counts = [one["count"] for one in _record(tpu[0], "lru")["collectives"]]
    assert max(counts) < 8, counts


def test_libtpu_says_what_a_program_wanted_and_nothing_else(tpu):
    done = tpu[1]
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert "needs" in errors[0]
    assert "GiB of memory on each chip of v5e:2x2, which has 16.00 GiB" in errors[0]
    assert "libtpu does not support the topology v5e:3x5" in errors[1]
    assert not done.stderr


@pytest.mark.skipif(not topologies.has_cuda_plugin(), reason="neither the extra cuda12 nor cuda13 is installed")
def test_gpus_are_compiled_for_without_one(tmp_path):
    command = [*VAE, "--topology=h100-16", "--config.model.width=512", "--config.batch_size=1024", "--workdir=x"]
    args = [sys.executable, "-c", SCRIPT, json.dumps([command])]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "x/plan.json").read_text())
    assert row["compiler"].startswith("XLA:GPU")
    assert row["flops_per_chip"] == pytest.approx(64 * (6 * sum(kernels(512)) - 2 * PIXELS * 512), rel=0.1)
    assert {(c["kind"], c["axis"], c["devices"]) for c in row["collectives"]} == {("all-reduce", "data", 16)}
    assert 0 <= sum(c["bytes"] for c in row["collectives"]) - 4 * num_params(512) <= 4 * 16
