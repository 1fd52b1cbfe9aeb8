"""Parameters that a regular expression freezes, or gives another learning rate."""

import json
import re

import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import pytest
from flax import nnx
from linear import LinearConfig, ModelConfig

from experiments import cifar_cnn
from research import app, optimizers, parameter_groups, sharding
from research.config import CNNConfig, OptimizerConfig
from research.data.sources import Dataset
from research.errors import UserError
from research.training import hyperparams
from research.training.loop import Loop
from research.training.population import Population
from research.training.run import Training


def _split(count):
    rng = np.random.default_rng(count)
    label = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 160, (count, 4, 4, 1)) + 40 * label[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": label}


DATASET = Dataset("drawn", ("a", "b", "c"), _split(48), _split(20), _split(5))


def _config(**fields):
    fields = {"name": "adamw", "ema_decay": 0.9, "clip_norm": 0.1, **fields}
    config = LinearConfig(num_epochs=1, batch_size=16, microbatch_size=8, model=ModelConfig(width=5))
    config.optimizer = optimizers.resolve(OptimizerConfig(**fields))
    return config


def _training(config):
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    return Training(config, linear.make_task(config, DATASET), DATASET, mesh)


def _trained(config):
    """Returns the parameters before, the run after all steps, and the metrics of the steps."""
    run = _training(config)
    before = jax.tree.map(np.asarray, run.state.all_params)
    with jax.set_mesh(run.mesh):
        metrics = [metrics for _, metrics in run.dispatches(run.epoch_end_steps[-1])]
    return before, run, metrics


def _arrays(tree):
    return dict(zip(parameter_groups.names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def test_a_frozen_parameter_keeps_its_bits_and_has_no_state_of_the_optimizer_and_no_average():
    before, run, _ = _trained(_config(freeze="^first/"))
    after = _arrays(run.state.all_params)
    for name, value in _arrays(before).items():
        assert np.array_equal(after[name], value) == name.startswith("first/")
    trained = {name: x.shape for name, x in after.items() if not name.startswith("first/")}
    shapes = [x.shape for x in jax.tree.leaves(run.state.opt_state) if x.ndim]
    assert sorted(shapes) == sorted(2 * list(trained.values()))  # AdamW's two moments
    assert {name: x.shape for name, x in _arrays(run.state.ema_params).items()} == trained
    evaluated = nnx.merge(run.graphdef, run.state.eval_params, run.state.eval_model_state)
    np.testing.assert_array_equal(evaluated.first.kernel[...], after["first/kernel"])


def _outputs_of_products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _outputs_of_products(inner)


@pytest.mark.parametrize("freeze", ["", "first"])
def test_the_step_does_not_differentiate_frozen_parameters(freeze):
    """The gradient of the first kernel is the only matrix product of its shape, 16 pixels x 5."""
    run = _training(_config(freeze=freeze))
    batch = jax.tree.map(lambda x: x[0], run._train_batches.example())
    arrays = run.state, run._train_batches.data, batch, run._hparams
    jaxpr = jax.make_jaxpr(run._steps.train_step)(*arrays).jaxpr
    shapes = list(_outputs_of_products(jaxpr))
    assert len(shapes) >= 4
    assert (bool({(16, 5), (5, 16)} & set(shapes))) == (not freeze)


@pytest.mark.slow
def test_the_gradients_norm_and_clipping_leave_frozen_parameters_out():
    """The trained parameters move as Optax moves them alone."""
    config = _config(name="sgd", learning_rate=1.0, clip_norm=0.01, freeze="kernel$", ema_decay=0.0)
    run = _training(config)
    params, batches = run.state.params, run._train_batches.batch(0)
    batch = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:]), batches).gather(run._train_batches.data)

    def loss(params):
        model = nnx.merge(run.graphdef, params, run.state.model_state)
        return run.task.evaluate(model, batch, key=jax.random.key(0), train=True)["loss"].mean()

    grads = jax.grad(loss)(params)
    norm = float(optax.tree.norm(grads))
    expected = {name: x - 0.01 / norm * g for (name, x), g in zip(_arrays(params).items(), jax.tree.leaves(grads))}
    with jax.set_mesh(run.mesh):
        _, metrics = next(run.dispatches(1))
    assert metrics["grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.01
    for name, x in _arrays(run.state.params).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_population_of_frozen_networks_trains_as_single_runs(tmp_path):
    configs = [_config(freeze="first/kernel", learning_rate_scale="second:0.5", learning_rate=x) for x in (0.01, 0.1)]
    population = Population(configs[0], linear.make_task(configs[0], DATASET), DATASET, jax.devices()[:1], 2)
    for slot, config in enumerate(configs):
        population.start(slot, config)
    reports = population.train_epoch()
    for slot, config in enumerate(configs):
        _, run, _ = _trained(config)
        with jax.set_mesh(run.mesh):
            expected = run.evaluate()
        assert reports[slot].metrics["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)


PARAMS = {"stem": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "head": {"kernel": np.full((3, 2), 2.0)}}
GRADS = jax.tree.map(lambda x: 0.1 * x, PARAMS)


@pytest.mark.parametrize("name", ["adamw", "momentum", "lars"])
def test_a_scaled_rate_is_that_of_an_optimizer_of_its_own(name):
    """As in a parameter group of PyTorch, it scales the decay, too; the first expression that matches counts."""
    scales = "^stem/(?:kernel|x{1,2}):0.1,stem:1e-2"

    def updates(**fields):
        config = optimizers.resolve(OptimizerConfig(name=name, weight_decay=0.1, **fields))
        tx = optimizers.make_optimizer(config, optimizers.boundaries(config, 10))
        params = jax.tree.map(jnp.float32, PARAMS)
        return tx.update(jax.tree.map(jnp.float32, GRADS), tx.init(params), params)[0]

    plain, scaled = updates(learning_rate=0.5), updates(learning_rate=0.5, learning_rate_scale=scales)
    np.testing.assert_allclose(scaled["stem"]["kernel"], 0.1 * plain["stem"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(scaled["stem"]["bias"], 0.01 * plain["stem"]["bias"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["head"]["kernel"], plain["head"]["kernel"])


@pytest.mark.slow
def test_mup_scales_the_trained_parameters_as_without_freezing():
    def updates(freeze):
        model = CNNConfig(width=8, parametrization="mup", base_width=4)
        config = cifar_cnn.CifarConfig(
            batch_size=4, model=model, optimizer=OptimizerConfig(name="adamw", freeze=freeze)
        )
        images = {"image": np.zeros((4, 20, 20, 3), np.uint8), "label": np.zeros(4, np.int32)}
        dataset = Dataset("drawn", ("a", "b"), images, None, images)
        config = cifar_cnn.EXPERIMENT.resolve(config, dataset)
        run = Training(
            config, cifar_cnn.make_task(config, dataset), dataset, sharding.make_mesh(config, jax.devices()[:1])
        )
        tx = hyperparams.make_optimizer(config, run._hparams, run.task.widths)
        ones = jax.tree.map(jnp.ones_like, run.state.params)
        return _arrays(tx.update(ones, run.state.opt_state, ones)[0])

    whole, part = updates(""), updates("^convs")
    assert 0 < len(part) < len(whole)
    for name, update in part.items():
        np.testing.assert_array_equal(update, whole[name])


@pytest.mark.slow
def test_a_run_with_frozen_parameters_resumes_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "draw", lambda _: None)
    flags = ["--config.dataset.name=digits", "--config.dataset.train_fraction=0.1", "--config.optimizer.ema_decay=0.9"]
    flags += ["--config.optimizer.freeze=^first/", "--config.optimizer.learning_rate_scale=bias$:0.1"]

    def run(name, epochs):
        args = [*flags, f"--workdir={tmp_path / name}", f"--config.num_epochs={epochs}"]
        return app.run(linear.EXPERIMENT, args, devices=jax.devices()[:1])

    first, whole = run("stopped", 1), run("whole", 2)
    resumed = run("stopped", 2)
    assert first["test_loss"] != resumed["test_loss"] == whole["test_loss"]
    assert whole["num_params"] == 32 * 32 * 10 + 10 + 10 * 10 + 10
    evaluated = app.run(
        linear.EXPERIMENT, [f"--workdir={tmp_path / 'whole'}", "--mode=eval"], devices=jax.devices()[:1]
    )
    assert evaluated["test_loss"] == pytest.approx(whole["test_loss"])
    assert json.loads((tmp_path / "whole/config.json").read_text())["optimizer"]["freeze"] == "^first/"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": "frist/kernel"}, "freeze=frist/kernel matches no parameter: the nearest is first/kernel"),
        ({"freeze": "bais"}, "the nearest is first/bias"),
        ({"freeze": "first|second"}, "freeze=first|second matches every parameter: leave some to train"),
        ({"learning_rate_scale": "third:0.1"}, "learning_rate_scale=third matches no parameter: the nearest is"),
        (
            {"freeze": "first", "learning_rate_scale": "first:0.1"},
            "matches only frozen parameters (--config.optimizer.freeze=first)",
        ),
    ],
)
def test_an_expression_without_effect_is_an_error_before_anything_is_compiled(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        _training(_config(**fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": "a("}, "freeze=a(: this is not a regular expression"),
        ({"learning_rate_scale": "a(:0.1"}, "learning_rate_scale=a(: this is not a regular expression"),
        *(
            ({"learning_rate_scale": text}, f"learning_rate_scale={text}: give REGEX:FACTOR with a factor above 0")
            for text in ("first", "first:", "first:x", "first:0", "first:-1", "first:1.2.3", "first:0.1,second", ":1")
        ),
    ],
)
def test_an_expression_that_cannot_be_parsed_is_an_error_before_the_data_is_loaded(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        optimizers.check(OptimizerConfig(**fields))
