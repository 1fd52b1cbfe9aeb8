"""Each member of a population over meshes matches a single run of its config on such a mesh."""

import dataclasses
import functools
import json

import jax
import numpy as np
import outsider
import pytest
from flax import nnx

pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from launch import sweep
from launch.sweeps import page
from research import optimizers, sharding
from research.config import MeshConfig
from research.data.sources import Dataset
from research.errors import UserError
from research.tasks.classification import Classification
from research.training import loop, population_devices
from research.training.mesh_population import MeshPopulation
from research.training.run import Training

RNG = np.random.default_rng(0)


def _split(count):
    label = RNG.integers(0, 3, count).astype(np.int32)
    images = RNG.integers(0, 160, (count, 4, 4, 1)) + 40 * label[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": label}


DATASET = Dataset("drawn", ("a", "b", "c"), _split(96), _split(30), _split(5))


class Network(outsider.BatchNorm):
    """Arrays of every kind: parameters, batch statistics and random keys."""

    def __init__(self, rngs):
        super().__init__(16, 3, rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        return super().__call__(self.dropout(x.reshape(len(x), -1), deterministic=not train), train=train)


TASK = Classification(Network, (0.5,), (0.25,))


def _config(seed, rate=0.02):
    """Two epochs over two devices, with averaged parameters."""
    fields = {"batch_size": 16, "seed": seed, "mesh": MeshConfig(data=1, fsdp=2)}
    config = dataclasses.replace(outsider.get_config(), **fields)
    optimizer = dataclasses.replace(config.optimizer, ema_decay=0.9, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizers.resolve(optimizer))


CONFIGS = [_config(0), _config(1, rate=0.1)]


@functools.cache
def _single_run(number):
    """The results of a single run after each of its epochs."""
    config = CONFIGS[number]
    mesh = sharding.make_mesh(config, jax.devices()[:2])
    with jax.set_mesh(mesh):
        run, found = Training(config, TASK, DATASET, mesh), []
        for end in run.epoch_end_steps:
            for _ in run.dispatches(end):
                pass
            found.append(run.evaluate())
    return found


def _population(devices, size):
    return MeshPopulation(CONFIGS[0], TASK, DATASET, jax.devices()[:devices], size)


def _agree(report, number):
    expected = _single_run(number)[report.epoch - 1]
    assert report.metrics["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
    assert report.metrics["validation_accuracy"] == pytest.approx(expected["validation_accuracy"])
    assert report.finished == (report.epoch == 2)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "size", "meshes"), [(4, 2, 2), (2, 3, 1)], ids=["at the same time", "in turn"])
def test_a_member_matches_a_single_run(devices, size, meshes):
    """On two meshes at the same time, or in turn on one; a freed slot is used again without compiling."""
    members = _population(devices, size)
    assert set(members.metric_names()) >= {"validation_loss", "validation_accuracy"}
    assert members.free == list(range(size))
    for slot in (0, 1):
        members.start(slot, CONFIGS[slot])
    for slot, report in members.train_epoch().items():
        _agree(report, slot)
    members.stop(1)
    assert members.free == list(range(1, size))
    members.start(1, CONFIGS[0])
    reports = members.train_epoch()
    assert [reports[slot].epoch for slot in (0, 1)] == [2, 1]
    for slot in (0, 1):
        _agree(reports[slot], 0)
    assert members.num_compilations == meshes
    used = {array.sharding.mesh.devices.size for array in jax.tree.leaves(members._trainers[0]._abstract)}
    assert used == {2}
    members.stop(0)
    assert members.train_epoch(lambda: True) == {}  # asked to stop before the next dispatch


@pytest.mark.slow
def test_a_diverged_member_does_not_affect_the_others():
    members = _population(2, 2)
    members.start(0, _config(1, rate=1e30))
    members.start(1, CONFIGS[1])
    reports = members.train_epoch()
    assert reports[0].finished
    assert reports[0].metrics == {}
    assert 1 < reports[0].diverged_at <= 6
    _agree(reports[1], 1)


def test_gradients_per_device_are_checked_as_in_a_single_run(monkeypatch):
    """Each device would draw the noise of the whole batch."""
    noise = type("Noise", (outsider.NETWORKS["Noise"],), {"per_device_gradients": True})
    monkeypatch.setitem(outsider.NETWORKS, "Noise", noise)
    config = dataclasses.replace(CONFIGS[0], network="Noise", mesh=MeshConfig(data=2))
    members = MeshPopulation(config, outsider.make_task(config, DATASET), DATASET, jax.devices()[:2], 1)
    with pytest.raises(UserError, match="per_device_gradients is declared"):
        members.start(0, config)


@pytest.mark.parametrize(
    ("axes", "size"),
    [({}, 1), ({"fsdp": 4}, 8), ({"data": 1, "fsdp": 4}, 4), ({"data": 8}, 8), ({"data": 1, "model": 2}, 2)],
)
def test_the_mesh_says_how_many_devices_a_member_has(axes, size):
    assert population_devices.devices_per_member(MeshConfig(**axes), 8) == size


SEARCH = ["linear", "--search=optimizer.learning_rate=[0.01,1e-5]", "--search=batch_size=[96,97]", "--sampler=grid"]
MESH = ["--config.mesh.data=2", "--config.mesh.model=2"]


@pytest.mark.slow
def test_a_sweep_over_a_mesh_ends_with_the_run_of_its_best_trial(tmp_path, monkeypatch, capsys):
    """Two trials fail, as their batches cannot be shared evenly; the two seeds of the others take turns."""
    monkeypatch.chdir(tmp_path)
    for owner, name in ((loop.Loop, "draw"), (page, "render")):  # take longer than training
        monkeypatch.setattr(owner, name, lambda *_: "")
    argv = [*SEARCH, *MESH, "--seeds=2", "--population=1", "--workdir=w", "--pruner=median"]
    assert sweep.run(argv) == 0
    printed = capsys.readouterr().out
    assert "1 run at a time, each over 4 devices, on 4 cpu devices" in printed
    found = json.loads((tmp_path / "w/sweep.json").read_text())
    assert (found["num_trials"], found["num_failed"], found["num_compilations"]) == (4, 2, 1)
    assert found["best_params"] == {"optimizer.learning_rate": 0.01, "batch_size": 96}
    assert found["best_command_value"] == pytest.approx(found["best_value"], rel=1e-6)
    assert json.loads((tmp_path / "w/best-0-seed1/summary.json").read_text())["device_count"] == 4
    assert "batch_size=97 cannot be split evenly over 2 devices" in (tmp_path / "w/trials.csv").read_text()
    assert sweep.run(argv) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--config.mesh.data=3"],
            r"mesh.data=3: each trial trains on 3 devices of one process, and the 8 here are no",
        ),
        (["--config.mesh.data=1", "--config.mesh.fsdp=16"], "cannot span several processes"),
        (["--config.mesh.fsdp=3"], "the sizes must multiply to the 8 devices here"),
        (["--config.mesh.fsdp=0"], "needs at least 1 device"),
        (["--config.mesh.sequence=2"], "this task is not parallel over time"),
        (
            [*MESH, "--population=3"],
            "the 8 devices here suffice for 2 at a time, each over 4; give at most --population=2",
        ),
        ([*MESH, "--processes=2"], "one process trains the trials over a mesh, on all devices; leave it out"),
        ([*MESH, "--search=mesh.fsdp=[1,2]"], "it says where the trials of a sweep train, not what they compute"),
    ],
)
def test_a_mesh_that_a_sweep_cannot_use_is_an_error_and_leaves_nothing(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        sweep.run([*SEARCH, *flags, "--workdir=w"])
    assert not list(tmp_path.iterdir())
