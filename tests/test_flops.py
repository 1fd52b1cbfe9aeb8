"""Model FLOPs equal closed forms, whatever the mesh and the rematerialization; utilization is relative to the peak."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import run
from flax import nnx
from jax.experimental import pallas

from experiments import char_rnn
from research import chips, flops, optimizers, sharding
from research.config import CNNConfig, Config, OptimizerConfig, RNNConfig
from research.data.batch import Batch
from research.data.sources import Dataset
from research.models import cnn
from research.tasks import token_loss
from research.tasks.classification import Classification
from research.training import hyperparams, summary
from research.training.state import abstract_state
from research.training.steps import Steps

B, T, W, V = 8, 6, 16, 20  # examples, time steps, width, vocabulary
IMAGES = np.zeros((B, 20, 20, 3), np.uint8)
TEXT = {"text": np.random.default_rng(0).integers(97, 97 + V, 1200, dtype=np.uint8)}
MUON = optimizers.resolve(OptimizerConfig(name="muon"))


def _images(network=lambda rngs: cnn.create(CNNConfig(width=4), image_shape=(20, 20, 3), num_classes=5, rngs=rngs)):
    batch = Batch({"image": IMAGES, "label": np.zeros(B, np.int32)}, index=np.arange(B), epoch=np.zeros(B, int))
    return Classification(network, (0.5,) * 3, (0.25,) * 3), Config(batch_size=B, optimizer=MUON), batch


def _text(**fields):
    model = RNNConfig(**{"width": W, "layers": 2, "dropout": 0.1, **fields})
    config = char_rnn.CharRNNConfig(batch_size=B, optimizer=MUON, model=model, sequence_length=T)
    dataset = char_rnn.prepare(config, Dataset("drawn", (), TEXT, None, TEXT))
    batch = Batch(dataset.train, index=np.arange(B), epoch=np.zeros(B, int)).gather(dataset.train)
    return char_rnn.make_task(config, dataset), config, batch


def _model_flops(task, config, batch, devices=1, **fields):
    """Traces a step of Muon, which has matrix products of its own."""
    config = dataclasses.replace(config, **fields)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    hparams = hyperparams.traced(config, 4)
    graphdef, _, state = abstract_state(task, hyperparams.make_optimizer(config, hparams, task.widths), config, mesh)
    count = config.batch_size // config.examples_at_once
    batches = jax.tree.map(lambda x: np.reshape(x, (1, count, -1, *np.shape(x)[1:])), batch)
    with jax.set_mesh(mesh):
        steps = Steps(task, graphdef, config, mesh)
        step = steps.jit_train(state).trace(state, {}, batches, np.int32(1), hparams).jaxpr
    return flops.model_flops(step)


CNN_FLOPS = 2 * B * (3 * (49 * 9 * 4 * 8 + 9 * 8 * 8 + 8 * 8 + 8 * 5) + 2 * 18 * 18 * 9 * 3 * 4)


@pytest.mark.parametrize(
    ("devices", "fields"), [(1, {}), (4, {}), (1, {"microbatch_size": 2}), (1, {"remat": "all"})], ids=str
)
def test_a_convolutional_network(devices, fields):
    """Three products for each multiplication, two for those with the images, which need no gradient."""
    assert _model_flops(*_images(), devices, **fields) == {"float32": CNN_FLOPS}


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_an_lstm(remat, monkeypatch):
    monkeypatch.setattr(token_loss, "MAX_LOGITS", B * V * 2)  # the loss, in chunks, computes the logits twice
    products = 2 * (W * 4 * W + W * 4 * W) + W * V  # of a token: inputs and recurrence of each layer, and logits
    # The first layer projects the vocabulary, which is smaller than the batch.
    saved = 3 * 2 * (B * T - V) * W * 4 * W
    assert _model_flops(*_text(), remat=remat) == {"float32": 3 * 2 * B * T * products - saved}


@pytest.mark.parametrize("remat", ["none", "blocks", "all"])
def test_a_transformer(remat):
    hidden = 8 * 6
    products = 2 * (4 * W * W + 3 * W * hidden + 2 * T * W) + W * V  # of a token; attention masks half of its products
    found = _model_flops(*_text(name="transformer", heads=2, dtype="bfloat16"), remat=remat)
    assert sum(found.values()) == 3 * 2 * B * T * products
    assert max(found, key=found.get) == "bfloat16"


@pytest.mark.parametrize(
    ("strides", "padding", "dilations", "groups"),
    [((2, 1), "SAME", ((1, 1), (1, 1)), 1), ((1, 1), ((2, 0), (-1, 3)), ((3, 2), (1, 2)), 3)],
)
def test_a_convolution_has_as_many_products_as_ones_add_up_to(strides, padding, dilations, groups):
    def convolve(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, strides, padding, *dilations, numbers, feature_group_count=groups
        )

    ones = jnp.ones((2, 5, 4, 6)), jnp.ones((3, 2, 6 // groups, 9))
    (found,) = flops.products(jax.jit(convolve).trace(*ones).jaxpr)
    assert found.flops == 2 * convolve(*ones).sum()


class _Iterates(nnx.Module):
    """Multiplies until the product is small, or in a custom kernel."""

    def __init__(self, rngs, kernel=False):
        self.linear, self._kernel = nnx.Linear(3, 5, rngs=rngs), kernel

    def __call__(self, images, *, train, key=None):
        x = images.mean((1, 2))
        if self._kernel:
            weights = pallas.pallas_call(
                lambda x, y: y.__setitem__(..., x[...]), jax.ShapeDtypeStruct((3, 3), "float32")
            )
            x = x @ jax.lax.stop_gradient(weights(jnp.ones((3, 3))))
        else:
            x = jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ jnp.ones((3, 3)), jax.lax.stop_gradient(x))
        return self.linear(x)


@pytest.mark.parametrize("kernel", [False, True])
def test_products_that_cannot_be_counted_leave_out_the_total(kernel):
    found = _model_flops(*_images(lambda rngs: _Iterates(rngs, kernel)))
    assert np.isnan(sum(found.values()))


def test_a_branch_that_cannot_be_counted_leaves_out_the_total_wherever_it_is():
    def loops(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)

    for branches in ((loops, lambda x: x @ x), (lambda x: x @ x, loops)):
        traced = jax.jit(lambda x, both=branches: jax.lax.cond(x.sum() > 0, *both, x)).trace(jnp.ones((3, 3)))
        assert np.isnan(sum(product.flops for product in flops.products(traced.jaxpr)))


def test_a_run_shows_and_records_its_utilization_where_the_peak_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("research.record.writer._SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    plain = run(tmp_path / "cpu")[1]
    linear = 2 * 2 * 8 * 36 * 3  # a batch of 8, 36 pixels, 3 classes
    assert plain["model_flops_per_step"] == linear
    assert "model_flops_utilization" not in plain
    assert "MFU" not in capsys.readouterr().out
    assert "utilization" not in summary.last_lines(plain, tmp_path)

    slow = dataclasses.replace(chips.CHIPS["tpu7x"], float32_flops=1e7)  # two devices, which share this peak
    monkeypatch.setattr(chips, "of_device", lambda _: slow)
    found = run(tmp_path / "known", devices=2)[1]
    used = found["model_flops_utilization"]
    assert used == pytest.approx(linear * found["examples_per_second"] / 8 / 1e7)
    shown = re.findall(r"([\d,]+) examples/s, MFU ([\d.]+)%", capsys.readouterr().out)
    assert shown
    for rate, percent in shown:
        assert float(percent) == pytest.approx(100 * linear * int(rate.replace(",", "")) / 8 / 1e7, abs=0.06)
    assert f", {used:.1%} model FLOPs utilization\n" in summary.last_lines(found, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("NVIDIA H200", "h200"), ("TPU v5 lite", "v5e"), ("NVIDIA H200 MIG 1g.18gb", None), ("cpu", None)],
)
def test_a_device_is_known_by_its_whole_name(kind, name):
    assert chips.of_device(kind) is (chips.CHIPS[name] if name else None)
