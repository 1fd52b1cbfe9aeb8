"""The train step is plain gradient descent, with the same result for any devices, microbatches and dispatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.cifar_cnn import EXPERIMENT, CifarConfig, make_task
from research import randomness, sharding
from research.config import AugmentConfig, CNNConfig, MeshConfig, OptimizerConfig
from research.data.pipeline import EvalBatches, TrainBatches
from research.data.sources import Dataset
from research.randomness import Stream
from research.tasks.classification import Classification
from research.training import hyperparams
from research.training.state import create_state
from research.training.steps import Steps


@functools.cache
def _dataset(count=96, side=20) -> Dataset:
    rng = np.random.default_rng(0)

    def split(count):
        label = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 160, (count, side, side, 3)) + 40 * label[:, None, None, None]
        return {"image": images.astype(np.uint8), "label": label}

    return Dataset("drawn", ("a", "b", "c"), split(count), None, split(30))


def _config(**fields) -> CifarConfig:
    config = CifarConfig(
        batch_size=16,
        model=CNNConfig(width=8),
        optimizer=OptimizerConfig(name="momentum", learning_rate=0.05),
    )
    config = dataclasses.replace(config, **fields)
    return EXPERIMENT.resolve(config, _dataset())


class Build:
    """Compiled steps of a config, shared by all its `Run`s."""

    def __init__(self, config, devices, task):
        dataset = _dataset()
        mesh = sharding.make_mesh(config, jax.devices()[:devices])
        self.hparams = hyperparams.traced(config, 10)
        graphdef, state = create_state(
            task, hyperparams.make_optimizer(config, self.hparams, task.widths), config, mesh
        )
        self.initial = jax.tree.map(np.array, state), jax.tree.map(lambda x: x.sharding, state)
        steps = Steps(task, graphdef, config, mesh)
        self.train, self.eval, self.num_replicas = steps.jit_train(state), steps.jit_eval(state), steps.num_replicas
        self.train_batches = functools.partial(TrainBatches, dataset.train, config, mesh, resident=True, capacity=10)
        self.eval_batches = EvalBatches(dataset.test, config, mesh, resident=True)


_BUILDS: dict[tuple[str, int], Build] = {}  # by the repr of a config, which is not hashable


class Run:
    """Compiled steps with a fresh state, as in the training loop."""

    def __init__(self, config, devices=1, task=None):
        key = (repr((config, task)), devices)
        if key not in _BUILDS:
            _BUILDS[key] = Build(config, devices, task or make_task(config, _dataset()))
        build = _BUILDS[key]
        self.state = jax.jit(lambda x: x, out_shardings=build.initial[1])(build.initial[0])
        self.train, self.eval, self.evals = build.train, build.eval, build.eval_batches
        self.batches = build.train_batches()
        self.hparams = build.hparams

    def steps(self, *counts):
        losses = []
        for count in counts:
            self.state, metrics = self.train(
                self.state, self.batches.data, self.batches.take(count), np.int32(count), self.hparams
            )
            jax.block_until_ready(self.state)  # several programs in flight on few cores starve each other
            losses.extend(np.asarray(metrics["loss"])[:count])
        return np.array(losses)

    def evaluate(self):
        arrays = self.state.eval_params, self.state.eval_model_state, {}
        sums = [self.eval(*arrays, self.evals.data, inputs)[1] for inputs in self.evals]
        return jax.tree.map(lambda *xs: np.sum(xs, dtype=np.float64), *sums)

    def leaves(self, name="params"):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(getattr(self.state, name))]


MESHES = {"data": MeshConfig(), "fsdp": MeshConfig(data=1, fsdp=-1), "all": MeshConfig(data=2, fsdp=2, model=2)}
RANDOM = {"augment": AugmentConfig(crop=2, flip="random", cutout=4), "label_smoothing": 0.1}


RULES = {
    "momentum": OptimizerConfig(name="momentum", learning_rate=0.05),
    "frozen": OptimizerConfig(name="momentum", learning_rate=0.05, ema_decay=0.9, freeze="^convs/1/|^logits/kernel"),
    "muon": OptimizerConfig(name="muon", learning_rate=0.01, ema_decay=0.9, clip_norm=1.0, weight_decay=0.01),
}


@pytest.mark.parametrize(
    ("mesh", "microbatch_size", "rule"),
    [
        pytest.param("data", 0, "momentum", marks=pytest.mark.slow),
        pytest.param("data", 8, "momentum", marks=pytest.mark.slow),
        pytest.param("fsdp", 8, "momentum", marks=pytest.mark.slow),
        ("all", 8, "momentum"),
        pytest.param("all", 0, "muon", marks=pytest.mark.slow),
        pytest.param("data", 8, "frozen", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_learn_what_one_learns(mesh, microbatch_size, rule):
    """Ten steps with batch norm over the global batch, augmentation and dropout."""
    model = CNNConfig(width=8, norm="batch", dropout=0.2)
    config = _config(microbatch_size=microbatch_size, model=model, optimizer=RULES[rule], **RANDOM)
    one, eight = Run(config), Run(dataclasses.replace(config, mesh=MESHES[mesh]), devices=8)
    np.testing.assert_allclose(one.steps(10), eight.steps(5, 5), rtol=1e-3)
    for name in ("params", "model_state"):
        for a, b in zip(one.leaves(name), eight.leaves(name), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3), one.evaluate(), eight.evaluate())
    if mesh != "data":
        shards = {leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(eight.state.params)}
        assert True in shards


@pytest.mark.slow
@pytest.mark.parametrize(("group", "mesh", "replicas"), [(4, "data", 8), (8, "data", 1), (8, "all", 1)])
def test_eight_devices_normalize_the_same_groups_as_one(group, mesh, replicas):
    """Each of eight devices has 4 examples; a group is one device's, or spans two."""
    config = _config(batch_size=32, model=CNNConfig(width=8, norm="batch", norm_group=group))
    one, eight = Run(config), Run(dataclasses.replace(config, mesh=MESHES[mesh]), devices=8)
    assert _BUILDS[repr((dataclasses.replace(config, mesh=MESHES[mesh]), None)), 8].num_replicas == replicas
    np.testing.assert_allclose(one.steps(10), eight.steps(10), rtol=1e-3)
    for name in ("params", "model_state"):
        for a, b in zip(one.leaves(name), eight.leaves(name), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_without_batch_norm_microbatches_change_no_result():
    whole, parts = Run(_config()), Run(_config(microbatch_size=4))
    np.testing.assert_allclose(whole.steps(10), parts.steps(10), rtol=1e-4)
    for a, b in zip(whole.leaves(), parts.leaves(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


class Linear(nnx.Module):
    """Softmax regression."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(20 * 20 * 3, 3, rngs=rngs)

    def __call__(self, images, *, train, key=None):
        return self.linear(images.reshape(len(images), -1))


def test_the_step_matches_gradient_descent_in_numpy():
    """Ten steps of softmax regression with label smoothing and momentum, in NumPy float64."""
    config = _config()
    mean, std, smoothing = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 0.1
    run = Run(config, task=Classification(Linear, mean, std, AugmentConfig(), smoothing))
    bias, kernel = (np.float64(x) for x in run.leaves())
    losses = run.steps(10)

    generators = [randomness.generator(Stream.DATA_ORDER, 0, epoch) for epoch in range(2)]
    train, order = _dataset().train, np.concatenate([generator.permutation(96) for generator in generators])
    velocity_kernel, velocity_bias, expected = 0.0, 0.0, []
    for step in range(10):
        index = order[16 * step : 16 * (step + 1)]
        x = ((train["image"][index] / 255 - 0.5) / 0.25).reshape(16, -1)
        target = np.eye(3)[train["label"][index]] * (1 - smoothing) + smoothing / 3
        logits = x @ kernel + bias
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        expected.append(-(target * log_p).sum(1).mean())
        error = (np.exp(log_p) - target) / 16
        velocity_kernel = 0.9 * velocity_kernel + x.T @ error
        velocity_bias = 0.9 * velocity_bias + error.sum(0)
        kernel, bias = kernel - 0.05 * velocity_kernel, bias - 0.05 * velocity_bias
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    np.testing.assert_allclose(run.leaves()[1], kernel, atol=1e-3)
    np.testing.assert_allclose(run.leaves()[0], bias, atol=1e-3)


def test_steps_per_dispatch_changes_no_bit():
    config = _config(model=CNNConfig(width=4, dropout=0.2), **RANDOM)
    whole, parts = Run(config), Run(config)
    np.testing.assert_array_equal(whole.steps(10), parts.steps(1, 4, 5))
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert whole.state.step == 10
    assert whole.train._cache_size() == parts.train._cache_size() == 1


def test_the_seed_is_a_traced_argument_that_decides_all_randomness():
    config = _config(model=CNNConfig(width=4, dropout=0.2), **RANDOM)
    runs = [Run(config) for _ in range(3)]
    runs[2].hparams = runs[2].hparams | {"seed": np.uint32(1)}
    first, same, other = (run.steps(2) for run in runs)
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    run, exact = (Run(_config(model=CNNConfig(width=8, dtype=dtype))) for dtype in ("bfloat16", "float32"))
    arrays = run.state, run.batches.data, run.batches.example(), np.int32(1), run.hparams
    assert "bf16" in run.train.lower(*arrays).as_text()
    losses, expected = run.steps(5), exact.steps(5)
    assert {leaf.dtype for leaf in run.leaves()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert not np.array_equal(losses, expected)


def test_the_state_is_donated():
    run = Run(_config(model=CNNConfig(width=4)))
    before = jax.tree.leaves(run.state.params)
    run.steps(1)
    assert all(leaf.is_deleted() for leaf in before)


def test_evaluation_uses_the_averaged_parameters_and_training_does_not():
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.05, ema_decay=0.9)
    averaged, plain = (
        Run(_config(optimizer=optimizer)),
        Run(_config(optimizer=dataclasses.replace(optimizer, ema_decay=0.0))),
    )
    initial = plain.leaves()
    np.testing.assert_array_equal(averaged.steps(1), plain.steps(1))
    decay = 1 / 10  # of the average in the first step
    for ema, before, after in zip(averaged.leaves("eval_params"), initial, plain.leaves(), strict=True):
        np.testing.assert_allclose(ema, decay * before + (1 - decay) * after, atol=1e-6)
    np.testing.assert_array_equal(averaged.steps(5), plain.steps(5))
    assert averaged.evaluate()[0]["loss"] != plain.evaluate()[0]["loss"]


def _views(images, mirror, translate):
    """Airbench's test-time augmentation: (weight, images) of the shifted and mirrored copies."""
    views = [(1.0, images)]
    if translate:
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
        views = [(0.5, images), (0.25, padded[:, :-2, :-2]), (0.25, padded[:, 2:, 2:])]
    return [(w / 2, x) for w, view in views for x in (view, view[:, :, ::-1])] if mirror else views


@pytest.mark.parametrize(("mirror", "translate"), [(False, False), (True, False), (False, True), (True, True)])
def test_evaluation_is_the_mean_cross_entropy_over_all_examples(mirror, translate):
    """Without the configured label smoothing and augmentation, and without padding."""
    views = {"mirror": mirror, "translate": translate}
    run = Run(_config(batch_size=16, model=CNNConfig(width=4, dropout=0.5), **views, **RANDOM))
    sums, weight = run.evaluate()
    test = _dataset().test
    task = make_task(_config(model=CNNConfig(width=4, dropout=0.5)), _dataset())
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0))))
    model = nnx.merge(graphdef, run.state.params, run.state.model_state)
    images = (test["image"] / 255 - np.array(task.mean)) / np.array(task.std)
    predict = jax.jit(lambda x: model(x, train=False))
    weighted = _views(images, mirror, translate)
    logits = sum(weight * np.float64(predict(jnp.asarray(view, jnp.float32))) for weight, view in weighted)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(30), test["label"]]
    assert weight == 30
    np.testing.assert_allclose(sums["loss"], loss.sum(), rtol=1e-4)
    assert sums["accuracy"] == (logits.argmax(1) == test["label"]).sum()


def test_the_gradient_norm_is_recorded_before_clipping():
    fields = {"name": "sgd", "learning_rate": 0.05}
    clipped, plain = (Run(_config(optimizer=OptimizerConfig(**fields, clip_norm=c))) for c in (1e-3, 0.0))
    norms = []
    for run in (clipped, plain):
        before = run.leaves()
        run.state, metrics = run.train(run.state, run.batches.data, run.batches.take(1), np.int32(1), run.hparams)
        moved = optax.tree.norm([a - b for a, b in zip(run.leaves(), before, strict=True)]) / 0.05
        norms.append((float(metrics["grad_norm"][0]), float(moved)))
    assert norms[0][0] == norms[1][0]
    np.testing.assert_allclose(norms[1][0], norms[1][1], rtol=1e-3)
    np.testing.assert_allclose(norms[0][1], 1e-3, rtol=1e-2)
