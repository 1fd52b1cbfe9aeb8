"""The training algorithms: Optax's update rules, schedules, clipping, weight decay, and the parameters' average.

Learning rate, momentum and weight decay are inputs of the step: they lie in the optimiser's state
(`optax.inject_hyperparams`), so a sweep changes them without compiling again (`set_hyperparams`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.config import OptimizerConfig
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
_DECOUPLED = ("adamw", "lion", "muon", "lars", "lamb")  # decay the kernels themselves
_ONE_CYCLE_WARMUP = 0.3
_MUON_ADAM_FACTOR = 0.1  # biases and norms go by Nesterov's Adam, whose customary rate is a tenth of Muon's
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


def unit_schedule(config: OptimizerConfig, num_train_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate at step (from 0) as a part of its peak.

    It rises linearly over the part `warmup` of training (one_cycle: 0.3 unless set), then stays at 1 (constant), falls
    to `end_factor` by half a cosine (cosine, one_cycle) or a line (linear), is divided by 10 at 1/2 and 3/4 of training
    (step), or is 10^(-i/7) in stage i of 8, each of which is three times as long as the one before (tripling: Burda et
    al. 2016, arXiv 1509.00519, section 5).
    """
    fraction = config.warmup
    if config.schedule == "one_cycle":
        fraction = config.warmup or _ONE_CYCLE_WARMUP
    warmup = round(fraction * num_train_steps)
    rest = max(num_train_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, rest, config.end_factor),
        "one_cycle": optax.cosine_decay_schedule(1.0, rest, config.end_factor),
        "linear": optax.linear_schedule(1.0, config.end_factor, rest),
        "step": optax.piecewise_constant_schedule(
            1.0, {num_train_steps // 2 - warmup: 0.1, num_train_steps * 3 // 4 - warmup: 0.1}
        ),
        "tripling": lambda step: 10.0 ** -(jnp.sum(step + warmup >= _tripling_starts(num_train_steps)) / 7),
    }[config.schedule]

    def schedule(step: Any) -> jax.Array:
        # (step + 1) / warmup: the first update already moves, the last of the warm-up is at the peak.
        return jnp.where(step < warmup, (step + 1) / max(warmup, 1), after(step - warmup))

    return schedule


def _tripling_starts(num_train_steps: int) -> np.ndarray:
    """The first step of stages 1 to 7; stage i lasts 3^i of 3^0 + ... + 3^7 = 3280 parts of training."""
    return np.round((3 ** np.arange(1, 8) - 1) / 2 / 3280 * num_train_steps).astype(np.int32)


def learning_rates(config: OptimizerConfig, num_train_steps: int) -> np.ndarray:
    """The learning rate of every step, float [num_train_steps], on the host."""
    assert config.learning_rate is not None, "resolve fills it"
    parts = jax.jit(jax.vmap(unit_schedule(config, num_train_steps)))(np.arange(num_train_steps))
    return np.asarray(parts, np.float64) * config.learning_rate


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
    # Duchi et al. 2011 start AdaGrad's sum of squares at 0, as PyTorch does; Optax's own default is 0.1.
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum),
        "nesterov": lambda: optax.sgd(rate, momentum, nesterov=True),
        "adagrad": lambda: optax.adagrad(rate, initial_accumulator_value=0.0, eps=1e-10),
        "rmsprop": lambda: optax.rmsprop(rate, decay=0.9, momentum=momentum),
        "adam": lambda: optax.adam(rate, b1=momentum),
        "adamw": lambda: optax.adamw(rate, b1=momentum, weight_decay=weight_decay, mask=_kernels),
        "lion": lambda: optax.lion(rate, b1=momentum, weight_decay=weight_decay, mask=_kernels),
        # You et al. 2017, arXiv 1708.03888, equation 6. What is not scaled by its own norm, biases and norms, goes at
        # the same small part of the rate.
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
            weight_decay=weight_decay,
            weight_decay_mask=_kernels,
            muon_weight_dimension_numbers=_muon_dimensions,
        ),
    }
    return rules[name]()


def make_optimizer(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformation:
    """The gradient's way to the update: clipping, weight decay, the rule, the schedule.

    AdamW, Lion, Muon, LARS and LAMB decay the kernels themselves (decoupled, as published); for the others weight decay
    adds weight_decay * kernel to the gradient, as in PyTorch.

    Args:
      config: resolved (`resolve`).
      num_train_steps: the schedule's length.

    Returns:
      A transformation whose state holds "learning_rate", "momentum" and "weight_decay" as inputs (`hyperparams`).
    """
    schedule = unit_schedule(config, num_train_steps)

    def build(learning_rate: Any, momentum: Any, weight_decay: Any) -> optax.GradientTransformation:
        # The rule gets a rate of 1 so that the schedule multiplies what is injected, never replaces it.
        decay = [] if config.name in _DECOUPLED else [optax.add_decayed_weights(weight_decay, _kernels)]
        rule = _rule(config.name, 1.0, momentum, weight_decay)
        return optax.chain(*decay, rule, optax.scale(learning_rate), optax.scale_by_schedule(schedule))

    inputs = {
        "learning_rate": config.learning_rate,
        "momentum": config.momentum or 0.0,
        "weight_decay": config.weight_decay,
    }
    injected = optax.inject_hyperparams(build, hyperparam_dtype=jnp.float32)(**inputs)
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), injected)
    return injected


_INPUTS = ("learning_rate", "momentum", "weight_decay")


def _is_input(path: Any, _: Any) -> bool:
    return "hyperparams" in str(path)


def hyperparams(opt_state: Any) -> dict[str, jax.Array]:
    """The inputs in an optimiser's state: "learning_rate", "momentum", "weight_decay", float32 scalars."""
    return {name: optax.tree.get(opt_state, name, filtering=_is_input) for name in _INPUTS}


def set_hyperparams(opt_state: Any, **values: Any) -> Any:
    """The state with other inputs: `set_hyperparams(opt_state, learning_rate=0.1)`."""
    values = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return optax.tree.set(opt_state, _is_input, **values)


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
