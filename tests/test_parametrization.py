"""muP: the scales equal its table, and the effect of an update does not depend on the width."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import char_rnn, cifar_cnn, mnist_vae
from research import config as config_lib
from research import optimizers
from research.config import CNNConfig, OptimizerConfig, RNNConfig, VAEConfig
from research.data.batch import Batch
from research.data.sources import Dataset
from research.errors import UserError
from research.parametrization import Widths

_RANDOM = np.random.default_rng(0)
IMAGES = {"image": _RANDOM.integers(0, 256, (16, 18, 18, 1), dtype=np.uint8), "label": np.arange(16) % 4}
TEXT = {"text": _RANDOM.integers(0, 20, 400, dtype=np.uint8)}


def _task(kind, rule="adam", **model):
    """Returns the experiment's task, its optimizer config and a batch."""
    names = tuple(map(str, range(20)))
    optimizer = OptimizerConfig(name=rule, learning_rate={"adam": 1e-3, "momentum": 0.02, "muon": 0.005}[rule])
    optimizer = optimizers.resolve(optimizer)
    numbers = {"index": np.arange(16), "epoch": np.zeros(16, np.int32), "step": np.int32(0)}
    options = {"batch_size": 16, "num_epochs": 1, "optimizer": optimizer}
    if kind in ("lstm", "transformer"):
        model = RNNConfig(name=kind, layers=1, **model)
        config = char_rnn.CharRNNConfig(**options, model=model, sequence_length=12)
        dataset = Dataset("drawn", names, TEXT, None, TEXT, shuffle=False)
        tokens = TEXT["text"][:208].reshape(16, 13)
        features = {"tokens": tokens, "first": np.ones(16, bool), "count": np.full(16, 12)}
        return char_rnn.make_task(config, dataset), config, Batch(features, **numbers)
    experiment, make_config, make_model = {
        "cnn": (cifar_cnn, cifar_cnn.CifarConfig, CNNConfig),
        "vae": (mnist_vae, mnist_vae.MnistVAEConfig, VAEConfig),
    }[kind]
    config = make_config(**options, model=make_model(**model))
    dataset = Dataset("drawn", names[:4], IMAGES, None, IMAGES)
    config = experiment.EXPERIMENT.resolve(config, dataset)
    return experiment.make_task(config, dataset), config, Batch(IMAGES, **numbers)


def _change(kind, rule, **model):
    """Returns the root mean square change of each example's loss by four updates."""
    task, config, batch = _task(kind, rule, **model)
    key, carry = jax.random.key(0), task.initial_carry(16)
    graphdef, params, rest = nnx.split(task.create_model(nnx.Rngs(0)), nnx.Param, ...)
    tx = optimizers.make_optimizer(config.optimizer, optimizers.boundaries(config.optimizer, 100), task.widths)

    @jax.jit
    def losses(params):
        network = nnx.merge(graphdef, params, rest)
        return task.advance(network, batch, carry, key=key, train=True)[0]["loss"]

    @jax.jit
    def update(params, state):
        updates, state = tx.update(jax.grad(lambda p: losses(p).mean())(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = losses(params), tx.init(params)
    for _ in range(4):
        params, state = update(params, state)
    return float(jnp.sqrt(jnp.mean(jnp.square(losses(params) - before))))


@pytest.mark.parametrize(
    ("kind", "rule", "widths"),
    [
        ("cnn", "adam", (64, 128)),
        pytest.param("lstm", "adam", (64, 256), marks=pytest.mark.slow),
        pytest.param("transformer", "adam", (64, 256), marks=pytest.mark.slow),
        pytest.param("vae", "muon", (256, 1024), marks=pytest.mark.slow),
    ],
)
def test_what_updates_change_does_not_depend_on_the_width(kind, rule, widths):
    mup = functools.partial(_change, kind, rule, parametrization="mup", base_width=widths[0] // 4)
    narrow, wide = (mup(width=width) for width in widths)
    assert 0.7 < wide / narrow < 1.4


@pytest.mark.slow
def test_with_the_standard_parametrization_it_does():
    narrow, wide = (_change("lstm", "adam", width=width) for width in (64, 256))
    assert wide / narrow > 2


def test_initial_kernels_and_rates_are_those_of_the_table():
    task, _, _ = _task("cnn", width=32, parametrization="mup", base_width=8)
    params = nnx.to_pure_dict(nnx.state(task.create_model(nnx.Rngs(0)), nnx.Param))
    widths = nnx.to_pure_dict(task.widths)
    # Four times as wide; the table has inputs, hidden layers, outputs, and a bias.
    hand = {
        # Optax scales the narrow one's update, 9 to 8, by 1, where the spectral condition has sqrt(8 / 9).
        ("convs", 0, "kernel"): {"sgd": 4.0, "adam": 1.0, "muon": (9 / 8) ** 0.5},
        ("convs", 1, "kernel"): {"nesterov": 1.0, "lion": 0.25, "muon": 1.0},
        ("hidden", "kernel"): {"momentum": 1.0, "adagrad": 0.25, "muon": 1.0},
        ("logits", "kernel"): {"sgd": 0.25, "adamw": 0.25, "muon": 0.5},
        ("logits", "bias"): {"sgd": 1.0, "rmsprop": 1.0, "muon": 1.0},
        ("norms", 1, "layer", "bias"): {"sgd": 4.0, "adam": 1.0, "muon": 1.0},
    }
    for path, rates in hand.items():
        width = functools.reduce(lambda tree, name: tree[name], path, widths)
        assert {rule: width.rate_scale(rule) for rule in rates} == pytest.approx(rates)
    deviation = {path: float(functools.reduce(lambda t, n: t[n], path, params).std()) for path in hand}
    assert deviation["convs", 1, "kernel"] == pytest.approx((9 * 32) ** -0.5, rel=0.03)
    assert deviation["logits", "kernel"] == pytest.approx(64**-0.5 / 2, rel=0.15)  # of 256 values


def test_a_network_narrower_than_the_base_keeps_its_norms_and_fan_in():
    task, _, _ = _task("cnn", width=8, norm="batch", parametrization="mup", base_width=32)
    params = nnx.to_pure_dict(nnx.state(task.create_model(nnx.Rngs(0)), nnx.Param))
    assert (params["norms"][0]["layer"]["scale"] == 1).all()
    assert float(params["convs"][1]["kernel"].std()) == pytest.approx((9 * 8) ** -0.5, rel=0.1)
    assert float(params["logits"]["kernel"].std()) == pytest.approx(16**-0.5 * 2, rel=0.15)


@pytest.mark.parametrize(("width", "base"), [(64, 16), (512, 128), (1024, 64), (16, 64)])
def test_muon_has_the_spectral_condition_at_every_shape(width, base):
    """An update's norm is Optax's sqrt(max(1, out / in)) times the rate, and goes as sqrt(out / in)."""
    sizes = {("encoder", "hidden", 0): (324, width, 324, base), ("decoder", "out"): (width, 324, base, 324)}
    task, _, _ = _task("vae", "muon", width=width, parametrization="mup", base_width=base)
    widths = nnx.to_pure_dict(task.widths)
    for path, (fan_in, fan_out, base_in, base_out) in sizes.items():
        rate = functools.reduce(lambda tree, name: tree[name], path, widths)["kernel"].rate_scale("muon")
        grown = max(1, fan_out / fan_in) ** 0.5 * rate / max(1, base_out / base_in) ** 0.5
        assert grown == pytest.approx((fan_out / fan_in / (base_out / base_in)) ** 0.5)


# An input kernel, a hidden and an output kernel, each this many times as wide as at the base width.
R = 4.0
KERNELS = {
    "input": Widths(inputs=1, outputs=R, ndim=2, shape=8),
    "hidden": Widths(inputs=R, outputs=R, ndim=2, shape=1),
    "output": Widths(inputs=R, outputs=1, ndim=2, shape=1 / 8),
}
# How the entries of a kernel and of its gradient grow with the width, which is what the table's rates follow from.
SIZES = {"input": (1, 1 / R), "output": (1 / R, 1)}


def _first_update(rule, kernel, gradient, widths):
    config = OptimizerConfig(name=rule, learning_rate=0.1, weight_decay=0.5)
    config = optimizers.resolve(config)
    tx = optimizers.make_optimizer(config, optimizers.boundaries(config, 10), {"kernel": widths})
    params, grads = ({"kernel": jnp.full((3, 3), value)} for value in (kernel, gradient))
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    return float(updates["kernel"][0, 0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", ["adamw", "lion", "muon", "sgd", "momentum", "nesterov"])
def test_a_step_shrinks_kernels_alike_at_every_width(rule, kernel):
    """By rate * decay, as with the package mup: MuAdamW and MuSGD multiply the decay by what divides the rate."""
    steps_ahead = 1.9 if rule == "nesterov" else 1.0
    shrinkage = _first_update(rule, 1.0, 0.0, KERNELS[kernel])
    assert shrinkage == pytest.approx(-0.1 * 0.5 * steps_ahead)


@pytest.mark.parametrize("kernel", SIZES)
@pytest.mark.parametrize("rule", ["adam", "adagrad", "rmsprop", "sgd", "momentum"])
def test_coupled_decay_is_the_same_part_of_the_gradient_at_every_width(rule, kernel):
    """Gradient and decay oppose each other here: at another ratio the update would have another sign or size."""
    size, gradient_size = SIZES[kernel]
    base = Widths(inputs=1, outputs=1, ndim=2, shape=1)
    for gradient in (-0.4, -0.6):
        narrow = _first_update(rule, 1.0, gradient, base)
        wide = _first_update(rule, size, gradient * gradient_size, KERNELS[kernel])
        assert wide == pytest.approx(narrow * size, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"parametrization": "mup"}, "needs --config.model.base_width"),
        ({"base_width": 8}, "needs --config.model.parametrization=mup"),
        ({"parametrization": "mup", "base_width": 8, "tied": True}, "--config.model.tied"),
    ],
)
def test_unsupported_configs_are_an_error(fields, words):
    with pytest.raises(UserError, match=words):
        config_lib.check(char_rnn.CharRNNConfig(model=RNNConfig(**fields)))


def test_layerwise_rules_are_refused():
    model, optimizer = CNNConfig(parametrization="mup", base_width=8), OptimizerConfig(name="lamb")
    with pytest.raises(UserError, match="lamb: mup has no rule"):
        config_lib.check(cifar_cnn.CifarConfig(model=model, optimizer=optimizer))
