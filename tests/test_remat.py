"""Rematerialization changes the memory of a train step, not its result."""

import dataclasses
import functools

import jax
import numpy as np
import outsider
import pytest
from flax import nnx

from experiments import char_rnn, cifar_cnn
from research import app, optimizers, sharding
from research.config import Config, OptimizerConfig, RNNConfig
from research.data import images
from research.data.batch import Batch
from research.data.sources import Dataset
from research.errors import UserError
from research.models.blocks import LECUN, Style
from research.tasks.classification import Classification
from research.training import hyperparams
from research.training.state import abstract_state
from research.training.steps import Steps

RNG = np.random.default_rng(0)
IMAGES = {"image": RNG.integers(0, 256, (64, 20, 20, 1), dtype=np.uint8), "label": np.arange(64) % 4}
NAMES = ("a", "b", "c", "d")
DATASET = Dataset("drawn", NAMES, IMAGES, None, IMAGES)
TEXT = {"text": RNG.integers(0, 20, 2000, dtype=np.uint8)}
OPTIMIZER = optimizers.resolve(OptimizerConfig(name="momentum", learning_rate=0.01))


class Block(nnx.Module):
    """A wide residual block with batch statistics and dropout."""

    def __init__(self, style, width):
        self.norm = style.normalization(width)
        self.expand, self.contract = style.linear(width, 2 * width), style.linear(2 * width, width)
        self.dropout = style.dropout()

    def __call__(self, x, *, train, key):
        y = nnx.gelu(self.expand(self.norm(x, train=train)))
        return x + self.contract(self.dropout(y, train=train, key=key))


class Deep(nnx.Module):
    """A stack of blocks that knows nothing of rematerialization."""

    per_device_gradients = True

    def __init__(self, rngs, depth=2, width=16, dropout=0.5, norm="batch"):
        style = Style(rngs, np.float32, dropout, norm, LECUN, LECUN)
        self.first = style.linear(400, width)
        self.stack = nnx.Sequential(*[Block(style, width) for _ in range(depth)])
        self.last = style.linear(width, 4)

    def __call__(self, x, *, train, key=None):
        keys = [None] * len(self.stack.layers) if key is None else jax.random.split(key, len(self.stack.layers))
        x = self.first(x.reshape(len(x), -1))
        for layer, layer_key in zip(self.stack.layers, keys):
            x = layer(x, train=train, key=layer_key)
        return self.last(x)


class Flat(nnx.Module):
    """A linear classifier without submodules."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(rngs.params.normal((400, 4)))

    def __call__(self, x, *, train, key=None):
        return x.reshape(len(x), -1) @ self.kernel


def _classification(network):
    return Classification(network, *DATASET.statistic(outsider.images.channel_statistics, "image"))


def _image_batch(count=16):
    return Batch(IMAGES, index=np.arange(count), epoch=np.zeros(count, np.int32)).gather(IMAGES)


def _text():
    config = char_rnn.CharRNNConfig(
        batch_size=16, optimizer=OPTIMIZER, model=RNNConfig(width=8, dropout=0.5), sequence_length=12
    )
    dataset = Dataset("drawn", tuple(map(str, range(20))), TEXT, None, TEXT, shuffle=False)
    features = {"tokens": TEXT["text"][:208].reshape(16, 13), "first": np.ones(16, bool), "count": np.full(16, 12)}
    return char_rnn.make_task(config, dataset), config, Batch(features, index=np.arange(16), epoch=np.zeros(16, int))


def _images(network, batch_size=16):
    task = Classification(network, *DATASET.statistic(images.channel_statistics, "image"))
    batch = Batch(IMAGES, index=np.arange(batch_size) % 64, epoch=np.zeros(batch_size, np.int32)).gather(IMAGES)
    return task, Config(batch_size=batch_size, optimizer=OPTIMIZER), batch


TASKS = {"lstm": _text, "outsider": lambda: _images(functools.partial(outsider.Everything, 400, 4))}


def _prepare(task, config, batch, devices=1):
    """Returns a function that compiles the train steps for a mode, and the arguments of one step."""
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    hparams = hyperparams.traced(config, 4)
    tx = hyperparams.make_optimizer(config, hparams, task.widths)
    graphdef, init, state = abstract_state(task, tx, config, mesh)
    count = config.batch_size // config.examples_at_once
    batches = jax.tree.map(lambda x: np.reshape(x, (1, count, -1, *np.shape(x)[1:])), batch)

    def compiled(mode):
        steps = Steps(task, graphdef, dataclasses.replace(config, remat=mode), mesh)
        assert steps.num_replicas == devices
        return steps.jit_train(state).lower(state, {}, batches, np.int32(1), hparams).compile()

    return compiled, init, (batches, np.int32(1), hparams)


def _after_a_step(modes, *args):
    """Returns the state and the metrics after one step in each mode."""
    compiled, init, (batches, *others) = _prepare(*args)
    state = jax.tree.map(np.asarray, init(np.uint32(0)))
    results = []
    for mode in modes:
        program = compiled(mode)
        # A compiled program does not move its arguments.
        placed = jax.tree.map(jax.device_put, (state, {}, batches, *others), program.input_shardings[0])
        results.append(jax.tree.map(np.asarray, program(*placed)))
    return results


def _assert_equal(one, other):
    def check(path, x, y):
        if np.issubdtype(x.dtype, np.floating):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))
        else:
            np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(check, one, other)


@pytest.mark.parametrize("name", [pytest.param("lstm", marks=pytest.mark.slow), "outsider"])
def test_a_step_is_the_same(name):
    """Parameters, random states and metrics; another dropout mask would change them all."""
    _assert_equal(*_after_a_step(("none", "all"), *TASKS[name]()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "devices", "microbatch_size"), [("blocks", 1, 4), ("all", 4, 0)], ids=["microbatches", "per device"]
)
def test_microbatches_and_per_device_gradients_are_the_same(mode, devices, microbatch_size):
    """Batch statistics, too: they change once for each microbatch."""
    task, config, batch = _images(Deep)
    config = dataclasses.replace(config, microbatch_size=microbatch_size)
    _assert_equal(*_after_a_step(("none", mode), task, config, batch, devices))


@pytest.mark.slow
def test_it_lowers_the_peak_memory():
    # The saving of "all" grows with the depth: 9 blocks are too few for a margin on every version of XLA.
    network = functools.partial(Deep, depth=16, width=64, dropout=0.0, norm="none")
    compiled = _prepare(*_images(network, batch_size=1024))[0]
    sizes = {mode: compiled(mode).memory_analysis().temp_size_in_bytes for mode in ("none", "blocks", "all")}
    assert sizes["blocks"] < 0.7 * sizes["none"], sizes
    assert sizes["all"] < 0.9 * sizes["blocks"], sizes


def test_a_network_without_submodules_is_an_error():
    with pytest.raises(UserError, match=r"--config\.remat=blocks: Flat has no submodules"):
        _prepare(*_images(Flat))[0]("blocks")


def test_an_unknown_mode_is_an_error():
    with pytest.raises(UserError, match="remat='some': use one of 'none', 'blocks', 'all'"):
        app.parse(cifar_cnn.EXPERIMENT, ["--config.remat=some"])
