"""The optimizer of a config: its update rule, learning-rate schedule, clipping, weight decay; and the average (EMA).

Every number of the config that a rule, a schedule or clipping reads may be traced, and so may the schedule's
`boundaries`: they are inputs of the step (`training/hyperparams.py`), so a sweep changes them without compiling again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.config import OptimizerConfig, is_on
from research.errors import UserError
from research.update_rules import kernel_mask, make_rule


class Defaults(NamedTuple):
    """The customary settings of a rule, for what the config leaves at None.

    Attributes:
      learning_rate: the peak.
      momentum: beta1 for Adam, AdamW, LAMB and Lion; None: the rule has no momentum.
      weight_decay: decoupled or coupled, see `make_optimizer`.
    """

    learning_rate: float
    momentum: float | None
    weight_decay: float


DEFAULTS = {
    "sgd": Defaults(0.1, None, 0.0),
    "momentum": Defaults(0.05, 0.9, 0.0),
    "nesterov": Defaults(0.05, 0.9, 0.0),
    "adagrad": Defaults(0.01, None, 0.0),
    "rmsprop": Defaults(0.001, 0.0, 0.0),
    "adam": Defaults(0.001, 0.9, 0.0),
    "adamw": Defaults(0.001, 0.9, 0.01),  # PyTorch's decay
    # Chen et al. 2023, arXiv 2302.06675, section 5: a rate 3 to 10 times smaller than AdamW's and a decay as many times
    # larger, so that rate * decay, the shrinkage of a step, is AdamW's. Here both factors are 10.
    "lion": Defaults(0.0001, 0.9, 0.1),
    # Published as 0.02 and 0.95; these were better on the tutorial CNN. No decay, as in Jordan's code and in Optax;
    # torch.optim.Muon's default is 0.1.
    "muon": Defaults(0.015, 0.9, 0.0),
    "lars": Defaults(4.0, 0.9, 0.0005),  # You et al. 2017, arXiv 1708.03888
    "lamb": Defaults(0.002, 0.9, 0.01),  # You et al. 2020, arXiv 1904.00962, for BERT
}
_DECOUPLED = ("adamw", "lion", "muon")  # decay the kernels themselves, whatever the gradient
_OWN_DECAY = ("lars", "lamb")  # the rule itself adds the decay, before it measures the update
_ONE_CYCLE_WARMUP = 0.3
_RATES_AT_ONCE = 2**16
_DECAYING = ("cosine", "linear", "one_cycle")


def check(config: OptimizerConfig) -> None:
    """Raises `UserError` where a field is set that the rule, the schedule or the scaling would ignore."""
    defaults = DEFAULTS[config.name]
    if config.momentum is not None and defaults.momentum is None:
        raise UserError(f"--config.optimizer.momentum: {config.name} has none; use momentum or nesterov")
    if config.end_factor and config.schedule not in _DECAYING:
        raise UserError(f"--config.optimizer.end_factor needs a schedule that uses it: {', '.join(_DECAYING)}")
    if config.batch_scaling == "none" and config.base_batch_size != OptimizerConfig.base_batch_size:
        raise UserError("--config.optimizer.base_batch_size needs --config.optimizer.batch_scaling=linear or sqrt")


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """The config with the rule's defaults in place of None.

    Raises:
      UserError: as `check`.
    """
    check(config)
    defaults = DEFAULTS[config.name]._asdict()
    return dataclasses.replace(config, **{name: x for name, x in defaults.items() if getattr(config, name) is None})


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


def make_optimizer(config: OptimizerConfig, boundaries: Any, widths: Any = None) -> optax.GradientTransformation:
    """The optimizer as one chain: clipping, weight decay, the rule, each parameter's rate, the schedule.

    Only kernels decay, arrays of two or more axes. AdamW, Lion, Muon and LAMB decay them directly (decoupled, as
    published); for the others weight_decay * kernel is added to the gradient, as in PyTorch (coupled), for LARS before
    it measures the gradient. The learning rate and the schedule scale the rule's update, its momentum included, as in
    PyTorch; Keras has the learning rate within the momentum (v = m v - rate g).

    Args:
      config: resolved (`resolve`); the numbers in it may be traced.
      boundaries: of the schedule, by the function of that name; may be traced.
      widths: a tree of `research.parametrization.Widths`, by which parameters' rates differ; None: they do not.
    """
    assert config.weight_decay is not None, "resolve fills it"
    clip = [optax.clip_by_global_norm(config.clip_norm)] if is_on(config.clip_norm) else []
    weight_decay, momentum = config.weight_decay, 0.0 if config.momentum is None else config.momentum
    rule = make_rule(config.name, momentum, weight_decay)
    coupled = decoupled = []
    if config.name in _DECOUPLED:
        # After the width's scale, so that a step shrinks kernels by rate * decay at every width.
        decoupled = [optax.add_decayed_weights(-weight_decay, kernel_mask)]
    elif config.name not in _OWN_DECAY:
        coupled = [_add_coupled_decay(weight_decay, widths)]
    by_width = [] if widths is None else [_scale_by_width(config.name, widths)]
    rate = optax.scale(config.learning_rate)  # pyright: ignore[reportArgumentType]
    schedule = optax.scale_by_schedule(unit_schedule(config, boundaries))
    fixed = [_fix_norms()] if config.fixed_norm else []
    return optax.chain(*clip, *coupled, rule, *by_width, *decoupled, rate, schedule, *fixed)


def _add_coupled_decay(weight_decay: Any, widths: Any) -> optax.GradientTransformation:
    if widths is None:
        return optax.add_decayed_weights(weight_decay, kernel_mask)

    def add(update: jax.Array, param: jax.Array, width: Any) -> jax.Array:
        return update + width.coupled_decay_scale * weight_decay * param if param.ndim > 1 else update

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, widths))


def _fix_norms() -> optax.GradientTransformation:
    """Makes the update set a convolution's kernel to norm sqrt(outputs) first, as airbench94_muon does (Jordan 2024).

    Where a normalization follows, the kernel's norm only decides the relative size of a step: this keeps it constant.
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
