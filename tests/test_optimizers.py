"""Schedules equal their closed forms, and every field of the optimizer config has its effect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import optimizers
from research.config import OPTIMIZERS, SCHEDULES, Config, OptimizerConfig
from research.errors import UserError
from research.training import hyperparams

STEPS = 10
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.standard_normal((3, 4)), "bias": RNG.standard_normal(4)}
GRADS = [{name: RNG.standard_normal(p.shape) for name, p in PARAMS.items()} for _ in range(STEPS)]
RATE, MOMENTUM = 0.03, 0.8


def _float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _resolved(**fields) -> OptimizerConfig:
    config = OptimizerConfig(**fields)
    config = optimizers.resolve(config)
    return config


def _made(config, num_train_steps=STEPS):
    return optimizers.make_optimizer(config, optimizers.boundaries(config, num_train_steps))


def _train(tx, params=PARAMS, grads=GRADS, opt_state=None):
    params = _float32(params)
    opt_state = tx.init(params) if opt_state is None else opt_state

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for g in grads:
        params, opt_state = step(params, opt_state, _float32(g))
    return params


def _ours(grads=GRADS, **fields):
    return _train(_made(_resolved(**fields)), grads=grads)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 8.0), ("sqrt", 8**0.5)])
def test_the_rate_grows_with_the_batch(scaling, factor):
    base = {} if scaling == "none" else {"base_batch_size": 128}
    config = _resolved(name="sgd", learning_rate=0.1, batch_scaling=scaling, **base)
    scaled = optimizers.scaled(config, 1024)
    assert scaled.learning_rate == pytest.approx(0.1 * factor)
    assert config.learning_rate == 0.1  # unchanged, since a resumed run scales the recorded value again


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_leaves_out_biases(name):
    plain, decayed = (_ours(name=name, weight_decay=w) for w in (0.0, 0.5))
    np.testing.assert_array_equal(plain["bias"], decayed["bias"])
    assert np.abs(plain["kernel"] - decayed["kernel"]).max() > 1e-4


def test_a_fixed_norm_is_set_before_each_update():
    """Convolution kernels start each step with norm sqrt(outputs); dense kernels and biases do not."""
    shapes = {"conv": (3, 3, 4, 16), "dense": (4, 16), "bias": (16,)}
    params, *grads = ({name: RNG.standard_normal(shape) for name, shape in shapes.items()} for _ in range(3))
    config = _resolved(name="sgd", learning_rate=RATE, fixed_norm=True)
    after = _train(_made(config, 2), params, grads)
    for name, expected in params.items():
        for gradient in grads:
            if name == "conv":
                expected = expected * 4 / np.linalg.norm(expected)
            expected = expected - RATE * gradient[name]
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-6)


def test_a_fixed_norm_needs_convolutions():
    tx = _made(_resolved(name="sgd", fixed_norm=True), 1)
    with pytest.raises(UserError, match="no convolutions"):
        tx.init({"kernel": np.ones((4, 4))})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule"), [*((n, "constant") for n in OPTIMIZERS), *(("adam", s) for s in SCHEDULES)]
)
def test_numbers_may_be_traced(name, schedule):
    """One compiled update serves all values of the fields that a sweep changes."""

    def config(rate, momentum, decay, clip, end, beta2, epsilon, factor):
        has_momentum, decays = name not in ("sgd", "adagrad"), schedule in ("cosine", "linear", "one_cycle")
        fields = {"momentum": momentum} if has_momentum else {}
        fields |= {"end_factor": end} if decays else {}
        fields |= {"decay_factor": factor} if schedule == "step" else {}
        second = {"beta2": beta2, "epsilon": epsilon}
        fields |= {field: x for field, x in second.items() if getattr(optimizers.DEFAULTS[name], field) is not None}
        shared = {"learning_rate": rate, "weight_decay": decay, "clip_norm": clip, "schedule": schedule, "warmup": 0.2}
        return dataclasses.replace(_resolved(name=name), **fields, **shared)

    @jax.jit
    def traced(params, numbers, boundaries):
        tx = optimizers.make_optimizer(config(*numbers), boundaries)
        opt_state = tx.init(params)
        for g in GRADS[:4]:
            updates, opt_state = tx.update(_float32(g), opt_state, params)
            params = optax.apply_updates(params, updates)
        return params

    for numbers, count in (
        ((0.1, 0.5, 0.1, 1.0, 0.2, 0.9, 1e-3, 0.3), 4),
        ((0.02, 0.8, 0.01, 9.0, 0.5, 0.99, 1e-2, 0.5), 10),
    ):
        boundaries = optimizers.boundaries(config(*numbers), count)
        expected = _train(_made(config(*numbers), count), grads=GRADS[:4])
        found = traced(_float32(PARAMS), tuple(map(jnp.float32, numbers)), boundaries)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)
    assert traced._cache_size() == 1


DECAYS = {"adamw": 0.01, "lion": 0.1, "lamb": 0.01, "lars": 0.0005}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_has_its_default_rate_momentum_and_decay(name):
    config = _resolved(name=name)
    for field, value in optimizers.DEFAULTS[name]._asdict().items():
        assert getattr(config, field) == value
    assert config.weight_decay == DECAYS.get(name, 0)
    jax.tree.map(np.testing.assert_array_equal, _ours(name=name), _ours(name=name, weight_decay=DECAYS.get(name, 0.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        *((name, ["beta2", "epsilon"]) for name in ("rmsprop", "adam", "adamw", "lamb", "muon")),
        ("lion", ["beta2"]),
        ("lars", ["epsilon"]),
        ("adagrad", ["epsilon", "initial_accumulator"]),
    ],
)
def test_every_number_of_a_rule_is_a_field(name, numbers):
    values = {"beta2": 0.5, "epsilon": 0.3, "initial_accumulator": 0.2}
    default = _ours(name=name, learning_rate=0.01)
    for field in values:
        if field in numbers:
            changed = _ours(name=name, learning_rate=0.01, **{field: values[field]})
            key = "bias" if name == "muon" else "kernel"
            assert not np.allclose(changed[key], default[key], rtol=1e-4)
        else:
            assert getattr(optimizers.DEFAULTS[name], field) is None


def test_default_numbers_are_constants_of_the_program_and_others_inputs():
    """As momentum is; but the default is exact, since 1 - 0.999 has an error of 5e-5 in float32."""
    paths = ("optimizer.beta2", "optimizer.epsilon", "optimizer.decay_factor")
    config = Config(optimizer=_resolved(name="adam", schedule="step"))
    assert not set(paths) & set(hyperparams.traced(config, 10))
    other = Config(optimizer=_resolved(name="adam", schedule="step", beta2=0.99, epsilon=1e-3, decay_factor=0.5))
    third = Config(optimizer=_resolved(name="adam", schedule="step", beta2=0.95, epsilon=1e-4, decay_factor=0.3))
    assert set(paths) < set(hyperparams.traced(other, 10))
    assert hyperparams.signature(other) == hyperparams.signature(third) != hyperparams.signature(config)


@pytest.mark.parametrize("name", DECAYS)
def test_an_explicit_0_turns_the_default_decay_off(name):
    assert _resolved(name=name, weight_decay=0.0).weight_decay == 0
    decayed, plain = _ours(name=name), _ours(name=name, weight_decay=0.0)
    assert not np.array_equal(decayed["kernel"], plain["kernel"])
    np.testing.assert_array_equal(decayed["bias"], plain["bias"])


def test_adamw_without_decay_is_adam():
    jax.tree.map(np.testing.assert_array_equal, _ours(name="adamw", weight_decay=0.0), _ours(name="adam"))


def test_lions_default_decay_shrinks_kernels_as_fast_as_adamws():
    adamw, lion = optimizers.DEFAULTS["adamw"], optimizers.DEFAULTS["lion"]
    assert lion.learning_rate * lion.weight_decay == pytest.approx(adamw.learning_rate * adamw.weight_decay)


@pytest.mark.parametrize("name", ["rmsprop", "momentum", "nesterov"])
def test_momentum_0_keeps_no_buffer(name):
    """The update equals that of a traced momentum close to 0, which has a buffer."""
    off, on = (_resolved(name=name, momentum=value) for value in (0.0, 1e-30))
    counts = [len(jax.tree.leaves(_made(config).init(_float32(PARAMS)))) for config in (off, on)]
    assert counts[1] - counts[0] == len(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), _train(_made(off)), _train(_made(on)))


def test_rmsprop_has_no_momentum_by_default():
    opt_state = _made(_resolved(name="rmsprop")).init(_float32(PARAMS))
    assert sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim) == sum(p.size for p in PARAMS.values())


def test_clipping_bounds_the_global_norm_and_0_is_none():
    grads = GRADS[:1]
    norm = np.sqrt(sum((g**2).sum() for g in grads[0].values()))
    for clip_norm, factor in ((0.0, 1.0), (1.0, 1 / norm), (2 * norm, 1.0)):
        after = _ours(grads, name="sgd", learning_rate=1.0, clip_norm=clip_norm)
        for key, p in PARAMS.items():
            np.testing.assert_allclose(after[key], p - factor * grads[0][key], rtol=1e-4, atol=1e-5)


def test_the_ema_equals_its_recursion():
    ema, expected = jnp.float32(0.0), 0.0
    for step, value in enumerate(RNG.standard_normal(300)):
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        ema = optimizers.update_ema(ema, jnp.float32(value), 0.95, jnp.int32(step))
    np.testing.assert_allclose(ema, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "sgd", "momentum": 0.9}, "sgd has none"),
        ({"name": "adagrad", "momentum": 0.0}, "adagrad has none"),
        ({"name": "sgd", "epsilon": 1e-8}, "epsilon: sgd has none"),
        ({"name": "lars", "beta2": 0.9}, "beta2: lars has none"),
        ({"name": "adam", "initial_accumulator": 0.1}, "initial_accumulator: adam has none"),
        ({"milestones": "0.5"}, "milestones needs"),
        ({"decay_factor": 0.5}, "decay_factor needs"),
        *(
            ({"schedule": "step", "milestones": text}, f"milestones={text}: give increasing fractions")
            for text in ("", "0.5,1", "0.3,1.2", "0.6,0.3", "0.3,0.3", "0,0.5", "30,60", "a", "1/0", "nan", "0.5,")
        ),
        ({"schedule": "constant", "end_factor": 0.1}, "end_factor needs"),
        ({"base_batch_size": 32}, "base_batch_size needs"),
        ({"schedule": "step", "end_factor": 0.1}, "end_factor needs"),
        ({"schedule": "tripling", "end_factor": 0.1}, "end_factor needs"),
    ],
)
def test_an_ignored_field_is_an_error(fields, words):
    with pytest.raises(UserError, match=words):
        optimizers.resolve(OptimizerConfig(**fields))


def test_the_global_norm_equals_numpys():
    rng = np.random.default_rng(0)
    tree = [rng.normal(size=shape).astype(np.float32) for shape in ((), (7,), (30, 40), (3, 3, 8, 16))]
    expected = np.linalg.norm(np.concatenate([x.astype(np.float64).ravel() for x in tree]))
    np.testing.assert_allclose(optimizers.global_norm(tree), expected, rtol=1e-6)


def test_the_recorded_rate_is_the_schedules_at_every_step(monkeypatch):
    monkeypatch.setattr(optimizers, "_STEPS_AT_ONCE", 4)  # so that there are several blocks
    config = OptimizerConfig(name="sgd", learning_rate=0.5, schedule="cosine", warmup=0.2)
    schedule = optimizers.unit_schedule(config, optimizers.boundaries(config, 10))
    rate = optimizers.learning_rate(config, 10)
    for step in (0, 1, 5, 9, 3, 4):
        assert rate(step) == pytest.approx(0.5 * float(schedule(step)))
