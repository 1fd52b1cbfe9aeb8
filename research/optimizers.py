"""The training algorithms: Optax's update rules, schedules, clipping, weight decay, and the parameters' average.

Every number of the config that a rule, a schedule or clipping reads may be traced, and so may the schedule's
`boundaries`: they are inputs of the step (`research.hyperparams`), so a sweep changes them without compiling again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.config import OptimizerConfig, is_on
from research.errors import UserError

# The customary learning rate and momentum of each rule (Adam, AdamW and Lion: beta1); None: the rule has no momentum.
DEFAULTS: dict[str, tuple[float, float | None]] = {
    "sgd": (0.1, None),
    "momentum": (0.05, 0.9),
    "nesterov": (0.05, 0.9),
    "adagrad": (0.01, None),
    "rmsprop": (0.001, 0.0),
    "adam": (0.001, 0.9),
    "adamw": (0.001, 0.9),
    "lion": (0.0001, 0.9),
    "muon": (0.015, 0.9),  # published as 0.02 and 0.95; these were better on the paper's network
    "lars": (4.0, 0.9),
    "lamb": (0.002, 0.9),
}
_DECOUPLED = ("adamw", "lion", "muon")  # decay the kernels themselves, whatever the gradient
_OWN_DECAY = ("lars", "lamb")
_ONE_CYCLE_WARMUP = 0.3
_MUON_ADAM_FACTOR = 0.1  # biases and norms go by Nesterov's Adam, whose customary rate is a tenth of Muon's
_RATES_AT_ONCE = 2**16
_LARS_TRUST = 0.001  # You et al.'s trust coefficient
_DECAYING = ("cosine", "linear", "one_cycle")


def resolve(config: OptimizerConfig) -> None:
    """Fills in place what the config leaves to the rule, so that the record shows it.

    Raises:
      UserError: a field is set that the rule, the schedule or the scaling would ignore.
    """
    learning_rate, momentum = DEFAULTS[config.name]
    if config.momentum is not None and momentum is None:
        raise UserError(f"--config.optimizer.momentum: {config.name} has none; use momentum or nesterov")
    if config.end_factor and config.schedule not in _DECAYING:
        raise UserError(f"--config.optimizer.end_factor needs a schedule that uses it: {', '.join(_DECAYING)}")
    if config.batch_scaling == "none" and config.base_batch_size != OptimizerConfig.base_batch_size:
        raise UserError("--config.optimizer.base_batch_size needs --config.optimizer.batch_scaling=linear or sqrt")
    if config.learning_rate is None:
        config.learning_rate = learning_rate
    if config.momentum is None:
        config.momentum = momentum


def scaled(config: OptimizerConfig, batch_size: int) -> OptimizerConfig:
    """The same with the peak learning rate that `batch_scaling` gives a batch size.

    In proportion to it (linear: Goyal et al. 2017, arXiv 1706.02677, section 2.1; for SGD and momentum, with a warm-up)
    or to its square root (sqrt: Krizhevsky 2014, arXiv 1404.5997; for rules that divide by the gradient's size).
    """
    assert config.learning_rate is not None, "resolve fills it"
    ratio = batch_size / config.base_batch_size
    factor = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[config.batch_scaling]
    return dataclasses.replace(config, learning_rate=config.learning_rate * factor)


def boundaries(config: OptimizerConfig, num_train_steps: int) -> np.ndarray:
    """The steps at which the schedule changes its course, int32 [n]; the first is the end of the warm-up.

    Then follow the last step (cosine, linear, one_cycle), 1/2 and 3/4 of training (step), or the first steps of stages
    1 to 7 (tripling), of which stage i lasts 3^i of 3^0 + ... + 3^7 = 3280 parts of training.
    """
    fraction = config.warmup
    if config.schedule == "one_cycle":
        fraction = config.warmup or _ONE_CYCLE_WARMUP
    after = {
        "constant": [],
        "step": [num_train_steps // 2, num_train_steps * 3 // 4],
        "tripling": np.round((3 ** np.arange(1, 8) - 1) / 2 / 3280 * num_train_steps),
    }.get(config.schedule, [num_train_steps])
    return np.array([round(fraction * num_train_steps), *after], np.int32)


def unit_schedule(config: OptimizerConfig, boundaries: Any) -> Callable[[Any], jax.Array]:
    """The learning rate at step (from 0) as a part of its peak.

    It rises linearly over the part `warmup` of training (one_cycle: 0.3 unless set), then stays at 1 (constant), falls
    to `end_factor` by half a cosine (cosine, one_cycle) or a line (linear), is divided by 10 at 1/2 and 3/4 of training
    (step), or is 10^(-i/7) in stage i of 8, each of which is three times as long as the one before (tripling: Burda et
    al. 2016, arXiv 1509.00519, section 5).

    Args:
      config: what it reads may be traced.
      boundaries: of the function of that name; may be traced.
    """
    warmup, later = boundaries[0], jnp.asarray(boundaries[1:])

    def after(step: Any) -> Any:
        match config.schedule:
            case "constant":
                return 1.0
            case "step":
                return 0.1 ** jnp.sum(step >= later)
            case "tripling":
                return 10.0 ** -(jnp.sum(step >= later) / 7)
        part = jnp.clip((step - warmup) / jnp.maximum(later[0] - warmup, 1), 0, 1)
        if config.schedule != "linear":
            part = (1 - jnp.cos(jnp.pi * part)) / 2
        return 1 - (1 - config.end_factor) * part

    def schedule(step: Any) -> jax.Array:
        # (step + 1) / warmup: the first update already moves, the last of the warm-up is at the peak.
        return jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), after(step))

    return schedule


def learning_rate(config: OptimizerConfig, num_train_steps: int) -> Callable[[int], float]:
    """The learning rate on the host, as a function of the step.

    It is made for many steps at a time: each time the device ends first what it has been given.
    """
    assert config.learning_rate is not None, "resolve fills it"
    peak = config.learning_rate
    parts = jax.jit(jax.vmap(unit_schedule(config, boundaries(config, num_train_steps))))

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> np.ndarray:
        return np.asarray(parts(number * _RATES_AT_ONCE + np.arange(_RATES_AT_ONCE)), np.float64) * peak

    return lambda step: float(block(step // _RATES_AT_ONCE)[step % _RATES_AT_ONCE])


def _kernels(params: Any) -> Any:
    """True for what decays: kernels, not biases and norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _muon_dimensions(params: Any) -> Any:
    """Kernels [..., in, out] as matrices (all but the last axis) x out; None (Adam) for biases and norms."""
    dims = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(
        lambda x: dims(reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1) if x.ndim > 1 else None, params
    )


def _rule(name: str, rate: Any, momentum: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Only LARS and LAMB decay by themselves: before they measure the update."""
    # Duchi et al. 2011 start AdaGrad's sum of squares at 0, as PyTorch does; Optax's own default is 0.1.
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum),
        "nesterov": lambda: optax.sgd(rate, momentum, nesterov=True),
        "adagrad": lambda: optax.adagrad(rate, initial_accumulator_value=0.0, eps=1e-10),
        "rmsprop": lambda: optax.rmsprop(rate, decay=0.9, momentum=momentum),
        "adam": lambda: optax.adam(rate, b1=momentum),
        "adamw": lambda: optax.adam(rate, b1=momentum),
        "lion": lambda: optax.lion(rate, b1=momentum, weight_decay=0.0),
        # Optax's form of You et al. 2017, arXiv 1708.03888, equation 6: the ratio is |w| / |g + decay w|, not
        # |w| / (|g| + decay |w|). What is not scaled by its own norm, biases and norms, goes at the same small part of
        # the rate.
        "lars": lambda: optax.lars(
            _LARS_TRUST * rate,
            weight_decay,
            _kernels,
            trust_coefficient=1.0,
            trust_ratio_mask=_kernels,
            momentum=momentum,
        ),
        # You et al. 2020, arXiv 1904.00962, algorithm 2.
        "lamb": lambda: optax.lamb(rate, b1=momentum, weight_decay=weight_decay, mask=_kernels),
        "muon": lambda: optax.contrib.muon(
            rate,
            beta=momentum,
            adam_learning_rate=_MUON_ADAM_FACTOR * rate,
            muon_weight_dimension_numbers=_muon_dimensions,
        ),
    }
    return rules[name]()


def make_optimizer(config: OptimizerConfig, boundaries: Any, widths: Any = None) -> optax.GradientTransformation:
    """The gradient's way to the update: clipping, weight decay, the rule, each parameter's rate, the schedule.

    AdamW, Lion, Muon and LAMB decay the kernels themselves (decoupled, as published); for the others weight decay adds
    weight_decay * kernel to the gradient, as in PyTorch, for LARS before it measures the gradient. The schedule scales
    what the rule has made, its momentum included.

    Args:
      config: resolved (`resolve`); the numbers in it may be traced.
      boundaries: of the schedule, by the function of that name; may be traced.
      widths: a tree of `research.parametrization.Widths`, by which parameters' rates differ; None: they do not.
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if is_on(config.clip_norm) else []
    weight_decay, momentum = config.weight_decay, 0.0 if config.momentum is None else config.momentum
    rule = _rule(config.name, 1.0, momentum, weight_decay)
    coupled = decoupled = []
    if config.name in _DECOUPLED:
        decoupled = [optax.add_decayed_weights(-weight_decay, _kernels)]
    elif config.name not in _OWN_DECAY:
        coupled = [optax.add_decayed_weights(weight_decay, _kernels)]
    by_width = [] if widths is None else [_scale_by_width(config.name, widths)]
    rate = optax.scale(config.learning_rate)  # pyright: ignore[reportArgumentType]
    schedule = optax.scale_by_schedule(unit_schedule(config, boundaries))
    fixed = [_fix_norms()] if config.fixed_norm else []
    return optax.chain(*clip, *coupled, rule, *by_width, *decoupled, rate, schedule, *fixed)


def _fix_norms() -> optax.GradientTransformation:
    """Makes the update set a convolution's kernel to norm sqrt(outputs) first, as airbench94_muon does (Jordan 2024).

    Where a normalisation follows, the kernel's norm changes nothing but the step's size relative to it: which so stays.
    """

    def init(params: Any) -> optax.EmptyState:
        if not any(x.ndim == 4 for x in jax.tree.leaves(params)):
            raise UserError("--config.optimizer.fixed_norm: the network has no convolutions; leave it out")
        return optax.EmptyState()

    def one(update: jax.Array, kernel: jax.Array) -> jax.Array:
        if kernel.ndim != 4:
            return update
        return update + (jnp.sqrt(kernel.shape[-1]) / global_norm(kernel) - 1) * kernel

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(one, updates, params), state

    return optax.GradientTransformation(init, update)


def _scale_by_width(rule: str, widths: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, w: w.rate_scale(rule) * u, updates, widths))


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all a tree's arrays together, float32 scalar: `optax.tree.norm`, by products.

    XLA:CPU's sum over all axes takes several rounds: an eighth of a small autoencoder's train step went into it.
    """
    dot = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(sum(dot(x, x, x.ndim) for x in jax.tree.leaves(tree)))


def update_ema(ema_params: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The moving average after update number `step` (from 0): ema + (1 - d) (params - ema), in float32.

    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that the average does not
    stay near the initial parameters early on.
    """
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, ema_params, 1.0 - decay_now)
