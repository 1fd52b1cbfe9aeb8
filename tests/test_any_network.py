"""Networks that know nothing of meshes (`outsider`) train on any mesh as on one device."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import outsider
import pytest
from flax import nnx
from tiny_images import DATASET

from research import optimizers, sharding
from research.config import MeshConfig
from research.data.pipeline import EvalBatches, TrainBatches
from research.data.sources import Dataset
from research.errors import ReplicaError, UserError
from research.layers.dropout import Dropout
from research.record.writer import Writer
from research.training import hyperparams, per_device
from research.training.checkpoint import Checkpoints
from research.training.loop import Loop, train_and_evaluate
from research.training.run import Training
from research.training.state import create_state
from research.training.steps import Steps

MESHES = {
    "data=4": MeshConfig(),
    "fsdp=4": MeshConfig(data=1, fsdp=-1),
    "data=2, model=2": MeshConfig(data=2, model=2),
    "data=2, fsdp=2, model=2": MeshConfig(data=2, fsdp=2, model=2),
}


def _config(network, mesh="data=4", freeze="", **fields):
    config = dataclasses.replace(outsider.get_config(), network=network, batch_size=16, mesh=MESHES[mesh], **fields)
    config.optimizer = dataclasses.replace(config.optimizer, ema_decay=0.9, freeze=freeze)
    config.optimizer = optimizers.resolve(config.optimizer)
    return config


def _trained(config, devices, task=None):
    """Returns the losses of four steps, the state, and the sums of an evaluation."""
    task = task or outsider.make_task(config, DATASET)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    hparams = hyperparams.traced(config, 4)
    graphdef, state = create_state(task, hyperparams.make_optimizer(config, hparams, task.widths), config, mesh)
    steps = Steps(task, graphdef, config, mesh)
    batches = TrainBatches(DATASET.train, config, mesh, resident=True, capacity=4)
    inputs = batches.take(4)
    if steps.num_replicas > 1:
        steps.check_per_device(state, batches.data, inputs, hparams)
    state, metrics = steps.jit_train(state)(state, batches.data, inputs, np.int32(4), hparams)
    if state.ema_model_state is not None:
        state, _ = steps.jit_estimate(state)(state, batches.data, batches.batch(3), np.int32(0), hparams)
    evals = EvalBatches(DATASET.test, config, mesh, resident=True)
    arrays = state.eval_params, state.eval_model_state, {}, evals.data, next(iter(evals))
    return np.asarray(metrics["loss"]), state, jax.device_get(steps.jit_eval(state)(*arrays)[1])


@functools.cache
def _one_device(network, contrastive, microbatch_size, freeze=""):
    return _trained(_config(network, freeze=freeze, contrastive=contrastive, microbatch_size=microbatch_size), 1)


def _agrees(network, mesh, microbatch_size, contrastive=False, freeze=""):
    fields = {"contrastive": contrastive, "microbatch_size": microbatch_size, "freeze": freeze}
    losses, *arrays = _trained(_config(network, mesh, **fields), 8 if "fsdp=2" in mesh else 4)
    expected, *expected_arrays = _one_device(network, contrastive, microbatch_size, freeze)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, many in zip(jax.tree.leaves(expected_arrays), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
        if isinstance(many, jax.Array):
            _replicas_are_equal(many)


@pytest.mark.parametrize(
    "network", ["BatchNorm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Spectral", "Dropout", "Noise"))]
)
def test_four_devices_train_as_one(network):
    _agrees(network, "data=4", microbatch_size=8)


FAST = ("data=4", 0), ("data=2, fsdp=2, model=2", 8)
COMBINATIONS = [
    pytest.param(mesh, size, marks=[] if (mesh, size) in FAST else pytest.mark.slow)
    for mesh in MESHES
    for size in (0, 8)
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "microbatch_size"), COMBINATIONS)
def test_everything_with_a_loss_over_pairs_trains_the_same_on_any_mesh(mesh, microbatch_size):
    _agrees("Everything", mesh, microbatch_size, contrastive=True)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2, fsdp=2, model=2"])
def test_everything_with_frozen_layers_trains_the_same_on_any_mesh(mesh):
    _agrees("Everything", mesh, microbatch_size=8, freeze="^first/|^norm/scale")


def _replicas_are_equal(array):
    shards = {}
    for shard in array.addressable_shards:
        first = shards.setdefault(str(shard.index), np.asarray(shard.data))
        np.testing.assert_array_equal(np.asarray(shard.data), first)


@pytest.mark.slow
def test_two_processes_train_as_one_device(env, tmp_path):
    """The network Everything, trained by the command: the metrics and the checkpoint's arrays agree."""
    env |= {"PYTHONPATH": f"{env['PYTHONPATH']}:{Path(__file__).parent}"}
    flags = ["--config.network=Everything", "--config.contrastive", "--config.microbatch_size=48"]
    flags += ["--config.num_epochs=1", "--config.log_every_steps=1"]
    for command in (["outsider", "--workdir=one"], ["launch.local", "outsider", "--processes=2", "--workdir=two"]):
        done = subprocess.run([sys.executable, "-m", *command, *flags], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (
        [line["loss"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in line]
        for name in ("one", "two")
    )
    assert len(one) == 14
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(_saved(tmp_path / "one")), jax.tree.leaves(_saved(tmp_path / "two")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def _saved(workdir):
    config = dataclasses.replace(outsider.get_config(), network="Everything", microbatch_size=48)
    config.optimizer = optimizers.resolve(config.optimizer)
    digits = Dataset("digits", tuple("0123456789"), {"image": np.zeros((1437, 32, 32, 1), np.uint8)}, None, {})
    task = outsider.make_task(config, digits)
    tx = hyperparams.make_optimizer(config, hyperparams.traced(config, 14), None)
    _, state = create_state(task, tx, config, sharding.make_mesh(config, jax.devices()[:1]))
    with Checkpoints(workdir, keep=2, message=print, read_only=True) as saved:
        state, _ = saved.restore(state)
    return state.params, state.model_state


def _declared(base, **attributes):
    return type(base.__name__, (base,), {"per_device_gradients": True, **attributes})


@pytest.mark.parametrize("network", ["BatchNorm", "Dropout", "Noise"])
def test_a_network_that_needs_the_whole_batch_but_declares_otherwise_is_an_error(network, monkeypatch):
    """Each device would have the statistics of a quarter of the batch, and all the same noise."""
    monkeypatch.setitem(outsider.NETWORKS, network, _declared(outsider.NETWORKS[network]))
    with pytest.raises(UserError, match="per_device_gradients is declared"):
        _trained(_config(network), 4)


class Plain(nnx.Linear):
    """Softmax regression: an example's loss does not depend on other examples."""

    per_device_gradients = True

    def __init__(self, inputs, classes, rngs):
        super().__init__(inputs, classes, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        return super().__call__(x.reshape(len(x), -1))


def test_a_loss_over_pairs_that_declares_per_device_gradients_is_an_error(monkeypatch):
    monkeypatch.setitem(outsider.NETWORKS, "Noise", Plain)
    _trained(_config("Noise"), 4)
    monkeypatch.setattr(outsider, "Contrastive", _declared(outsider.Contrastive))
    with pytest.raises(UserError, match="are not those of the whole batch"):
        _trained(_config("Noise", contrastive=True), 4)


def test_per_device_state_that_declares_per_device_gradients_is_a_type_error(monkeypatch):
    monkeypatch.setitem(outsider.NETWORKS, "Spectral", _declared(outsider.Spectral))
    with pytest.raises(ValueError, match="shard_map") as error:
        _trained(_config("Spectral"), 4)
    assert "per_device_gradients" in error.value.__notes__[0]


class Silent(nnx.Module):
    """Noise that a kernel of zeros hides at initialization."""

    per_device_gradients = True

    def __init__(self, inputs, classes, rngs):
        self.first = nnx.Linear(inputs, 16, rngs=rngs)
        self.last = nnx.Linear(16, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        x = self.first(x.reshape(len(x), -1))
        return self.last(x + jax.random.normal(key, x.shape) if train else x)


def test_a_violation_hidden_at_initialization_is_an_error_at_the_first_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setitem(outsider.NETWORKS, "Noise", Silent)
    config = _config("Noise", num_epochs=1)
    mesh = sharding.make_mesh(config, jax.devices()[:4])
    with pytest.raises(UserError, match="per_device_gradients is declared"):
        train_and_evaluate("outsider", config, outsider.make_task(config, DATASET), DATASET, mesh, tmp_path)
    assert (tmp_path / "metrics.jsonl").stat().st_size
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def test_a_declaration_is_not_inherited():
    """A subclass may break what its base promises."""

    class Base(nnx.Module):
        per_device_gradients = True

        def __init__(self, rngs):
            self.dropout = Dropout(0.5)

    class Derived(Base):
        pass

    mesh = sharding.make_mesh(_config("Noise"), jax.devices()[:4])
    task = outsider.make_task(_config("Noise"), DATASET)
    counts = [per_device.num_replicas(dataclasses.replace(task, network=each), mesh, 8) for each in (Base, Derived)]
    assert counts == [4, 1]


def test_bfloat16_gradients_of_a_network_that_declares_nothing_are_an_error():
    config = _config("Noise")
    config.mesh = MeshConfig(reduce_dtype="bfloat16")
    with pytest.raises(UserError, match=r"reduce_dtype=bfloat16.*declare per_device_gradients"):
        _trained(config, 4)


def _spoilt(array, device, value):
    """Returns the array with one element changed on one device, as by a faulty processor."""
    shards = array.addressable_shards
    replicas = [np.array(shard.data) for shard in shards]
    replicas[device][0, 0] = value
    arrays = [jax.device_put(replica, shard.device) for replica, shard in zip(replicas, shards)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, arrays)


@pytest.mark.parametrize(
    ("devices", "named"), [(4, [2]), (2, [0, 1])], ids=["three against one", "nobody knows which of two"]
)
def test_replicas_that_differ_stop_the_run_and_keep_the_last_checkpoint(devices, named, tmp_path):
    config = dataclasses.replace(_config("BatchNorm"), num_epochs=1)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    run = Training(config, outsider.make_task(config, DATASET), DATASET, mesh)
    with (
        Writer(tmp_path, run.epoch_end_steps[-1], active=True) as writer,
        Checkpoints(tmp_path, keep=2, message=print) as saved,
        jax.set_mesh(mesh),
    ):
        loop = Loop("outsider", run, writer, saved)
        run.compile(train=True)
        loop.save()
        for _ in run.dispatches(2):
            pass
        kernel = run.state.params["last"]["kernel"]
        # NaN: each process would judge finiteness by its own replica.
        kernel[...] = _spoilt(kernel[...], named[-1], np.nan)
        with pytest.raises(ReplicaError, match=r"params\.last\.kernel") as error:
            loop.save()
    for number, device in enumerate(mesh.devices.flat):
        assert (f"{device} of process 0" in str(error.value)) == (number in named)
    assert ("no majority" in str(error.value)) == (devices == 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_non_finite_losses_of_a_part_are_an_error_and_of_the_whole_are_not():
    whole = np.float32([1, 2, 3])
    with pytest.raises(UserError, match="nan"):
        per_device.check_losses(whole, np.float32([1, np.nan, 3]))
    per_device.check_losses(np.float32([1, np.nan, 3]), whole)


def test_bfloat16_rounding_is_no_error_if_all_losses_are_alike():
    whole = np.full(8, 2.3, np.float32)
    per_device.check_losses(whole, whole * np.float32(1 + 2.0**-9))
    with pytest.raises(UserError):
        per_device.check_losses(whole, whole * np.float32(1.01))
