"""The optimizer of a config: update rule, learning-rate schedule, gradient clipping, weight decay; and the EMA.

The numbers of the config that rules, schedules and clipping read may be traced, and so may the schedule's `boundaries`:
they are inputs of the step (`training/hyperparams.py`), so a sweep changes them without recompiling.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import parameter_groups
from research.config import OptimizerConfig, is_on
from research.errors import UserError
from research.update_rules import kernel_mask, make_rule


class Defaults(NamedTuple):
    """A rule's default hyperparameters, used for fields of the config that are None; None: the rule has no such number.

    Attributes:
      learning_rate: the peak learning rate.
      momentum: beta1 for Adam, AdamW, LAMB and Lion.
      weight_decay: decoupled or coupled, see `make_optimizer`.
      beta2: decay of the mean of squared gradients; Lion's beta2.
      epsilon: added to the denominator of the update.
      initial_accumulator: the initial sum of squared gradients.
    """

    learning_rate: float
    momentum: float | None
    weight_decay: float
    beta2: float | None = None
    epsilon: float | None = None
    initial_accumulator: float | None = None


DEFAULTS = {
    "sgd": Defaults(0.1, None, 0.0),
    "momentum": Defaults(0.05, 0.9, 0.0),
    "nesterov": Defaults(0.05, 0.9, 0.0),
    "adagrad": Defaults(0.01, None, 0.0, epsilon=1e-10, initial_accumulator=0.0),
    "rmsprop": Defaults(0.001, 0.0, 0.0, 0.99, 1e-8),
    "adam": Defaults(0.001, 0.9, 0.0, 0.999, 1e-8),
    "adamw": Defaults(0.001, 0.9, 0.01, 0.999, 1e-8),  # PyTorch's decay
    # Chen et al. 2023, arXiv 2302.06675, section 5: a rate 3 to 10 times smaller than AdamW's and a decay as many times
    # larger, so that rate * decay, the shrinkage of a step, is AdamW's. Here both factors are 10.
    "lion": Defaults(0.0001, 0.9, 0.1, beta2=0.99),
    # The published values are 0.02 and 0.95; these were better on the tutorial CNN. No decay, as in Jordan's code and
    # in Optax; torch.optim.Muon's default is 0.1.
    "muon": Defaults(0.015, 0.9, 0.0, 0.999, 1e-8),
    "lars": Defaults(4.0, 0.9, 0.0005, epsilon=0.0),  # You et al. 2017, arXiv 1708.03888
    "lamb": Defaults(0.002, 0.9, 0.01, 0.999, 1e-6),  # You et al. 2020, arXiv 1904.00962, for BERT
}
_DECOUPLED_DECAY = ("adamw", "lion", "muon")  # decay the kernels directly, independent of the gradient
_OWN_DECAY = ("lars", "lamb")  # the rule adds the decay itself, before it computes the norm of the update
_ONE_CYCLE_WARMUP = 0.3
_STEPS_AT_ONCE = 2**16
_DECAYING = ("cosine", "linear", "one_cycle")


def check(config: OptimizerConfig) -> None:
    """Raises `UserError` if a field is set that the rule, the schedule or the batch scaling ignores."""
    for name, default in DEFAULTS[config.name]._asdict().items():
        if default is None and getattr(config, name) is not None:
            advice = "use momentum or nesterov" if name == "momentum" else "leave it out"
            raise UserError(f"--config.optimizer.{name}: {config.name} has none; {advice}")
    if config.end_factor and config.schedule not in _DECAYING:
        raise UserError(f"--config.optimizer.end_factor needs a schedule that uses it: {', '.join(_DECAYING)}")
    for name in ("milestones", "decay_factor"):
        if config.schedule != "step" and getattr(config, name) != getattr(OptimizerConfig, name):
            raise UserError(f"--config.optimizer.{name} needs --config.optimizer.schedule=step")
    _milestones(config)
    parameter_groups.check_syntax(config)
    if config.batch_scaling == "none" and config.base_batch_size != OptimizerConfig.base_batch_size:
        raise UserError("--config.optimizer.base_batch_size needs --config.optimizer.batch_scaling=linear or sqrt")


def _milestones(config: OptimizerConfig) -> list[Fraction]:
    try:
        milestones = [Fraction(text) for text in config.milestones.split(",")]
    except (ValueError, ZeroDivisionError):
        milestones = []
    increasing = [0, *milestones, 1]
    if not milestones or any(a >= b for a, b in itertools.pairwise(increasing)):
        raise UserError(
            f"--config.optimizer.milestones={config.milestones}: give increasing fractions of training, above 0 and "
            "below 1, as in 0.3,0.6,0.9"
        )
    return milestones


def is_default(config: OptimizerConfig, name: str) -> bool:
    """Returns whether a field of a resolved config has its default value, that of the rule if the field's is None."""
    default = getattr(OptimizerConfig, name)
    return getattr(config, name) == (getattr(DEFAULTS[config.name], name) if default is None else default)


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """Returns the config with the rule's defaults in the fields that are None.

    Raises:
      UserError: as `check`.
    """
    check(config)
    defaults = DEFAULTS[config.name]._asdict()
    return dataclasses.replace(config, **{name: x for name, x in defaults.items() if getattr(config, name) is None})


def scaled(config: OptimizerConfig, batch_size: int) -> OptimizerConfig:
    """Returns the config with the peak learning rate scaled to the batch size, as `batch_scaling` says.

    In proportion to the batch size (linear: Goyal et al. 2017, arXiv 1706.02677, section 2.1; for SGD and momentum,
    with a warm-up) or to its square root (sqrt: Krizhevsky 2014, arXiv 1404.5997; for adaptive rules such as Adam).
    """
    assert config.learning_rate is not None, "resolve fills it"
    ratio = batch_size / config.base_batch_size
    factor = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[config.batch_scaling]
    return dataclasses.replace(config, learning_rate=config.learning_rate * factor)


def boundaries(config: OptimizerConfig, num_train_steps: int) -> np.ndarray:
    """Returns the schedule's boundary steps, int32 [n]; the first is the end of the warm-up.

    The others are the last step (cosine, linear, one_cycle), the milestones (step), or the first steps of
    stages 1 to 7 (tripling), where stage i lasts 3^i / (3^0 + ... + 3^7) = 3^i / 3280 of training.
    """
    fraction = config.warmup
    if config.schedule == "one_cycle":
        fraction = config.warmup or _ONE_CYCLE_WARMUP
    after = {
        "constant": [],
        "step": [int(milestone * int(num_train_steps)) for milestone in _milestones(config)],
        "tripling": np.round((3 ** np.arange(1, 8) - 1) / 2 / 3280 * num_train_steps),
    }.get(config.schedule, [num_train_steps])
    return np.array([round(fraction * num_train_steps), *after], np.int32)


def unit_schedule(config: OptimizerConfig, boundaries: Any) -> Callable[[Any], jax.Array]:
    """Returns the learning-rate schedule with a peak of 1, a function of the step (from 0).

    After a linear warm-up over the fraction `warmup` of training (one_cycle: 0.3 unless set), the rate

    - constant: stays at 1;
    - cosine, one_cycle: decays to `end_factor` by half a cosine;
    - linear: decays to `end_factor` linearly;
    - step: is multiplied by `decay_factor` at each of the milestones (by default 0.1, at 1/2 and 3/4 of training);
    - tripling: is 10^(-i/7) in stage i of 8, each three times as long as the one before (Burda et al. 2016, arXiv
      1509.00519, section 5).

    Args:
      config: its numbers may be traced.
      boundaries: those of the function `boundaries`; may be traced.
    """
    warmup, later = boundaries[0], jnp.asarray(boundaries[1:])

    def after(step: Any) -> Any:
        match config.schedule:
            case "constant":
                return 1.0
            case "step":
                return config.decay_factor ** jnp.sum(step >= later)
            case "tripling":
                return 10.0 ** -(jnp.sum(step >= later) / 7)
        progress = jnp.clip((step - warmup) / jnp.maximum(later[0] - warmup, 1), 0, 1)
        if config.schedule != "linear":
            progress = (1 - jnp.cos(jnp.pi * progress)) / 2
        return 1 - (1 - config.end_factor) * progress

    def schedule(step: Any) -> jax.Array:
        # (step + 1) / warmup: the first update is not 0, and the last of the warm-up is at the peak.
        return jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), after(step))

    return schedule


def learning_rate(config: OptimizerConfig, num_train_steps: int) -> Callable[[int], float]:
    """Returns the learning rate on the host, as a function of the step."""
    assert config.learning_rate is not None, "resolve fills it"
    peak = config.learning_rate
    schedule = jax.jit(jax.vmap(unit_schedule(config, boundaries(config, num_train_steps))))

    # Computed for many steps at once, since every call waits for the device work queued before it.
    @functools.lru_cache(maxsize=1)
    def block(number: int) -> np.ndarray:
        return np.asarray(schedule(number * _STEPS_AT_ONCE + np.arange(_STEPS_AT_ONCE)), np.float64) * peak

    return lambda step: float(block(step // _STEPS_AT_ONCE)[step % _STEPS_AT_ONCE])


def make_optimizer(config: OptimizerConfig, boundaries: Any, widths: Any = None) -> optax.GradientTransformation:
    """Builds the optimizer as one chain: clipping, weight decay, the rule, each parameter's rate, the schedule.

    Only kernels (arrays of two or more axes) decay. For AdamW, Lion, Muon and LAMB the decay is decoupled, as
    published. For the other rules it is coupled, as in PyTorch: weight_decay * kernel is added to the gradient (for
    LARS before its norm is computed). The learning rate and the schedule scale the rule's update after momentum, as in
    PyTorch; in Keras the learning rate is within the momentum (v = m v - rate g). A parameter's scaled learning rate
    (`learning_rate_scale`) scales its decay, too, as in a parameter group of PyTorch.

    Args:
      config: after `resolve`; its numbers may be traced.
      boundaries: those of the function `boundaries`; may be traced.
      widths: a pytree of `research.parametrization.Widths`, which scale the parameters' learning rates; None: no scale.
    """
    assert config.weight_decay is not None, "resolve fills it"
    clip = [optax.clip_by_global_norm(config.clip_norm)] if is_on(config.clip_norm) else []
    weight_decay, rule = config.weight_decay, make_rule(config)
    coupled = decoupled = []
    if config.name in _DECOUPLED_DECAY:
        # After the scale by width, so that a step shrinks kernels by rate * decay at every width.
        decoupled = [optax.add_decayed_weights(-weight_decay, kernel_mask)]
    elif config.name not in _OWN_DECAY:
        coupled = [_add_coupled_decay(weight_decay, widths)]
    by_width = [] if widths is None else [_scale_by_width(config.name, widths)]
    scaled = [parameter_groups.scale_rates(config.learning_rate_scale)] if config.learning_rate_scale else []
    rate = optax.scale(config.learning_rate)  # pyright: ignore[reportArgumentType]
    schedule = optax.scale_by_schedule(unit_schedule(config, boundaries))
    fixed = [_fix_norms()] if config.fixed_norm else []
    return optax.chain(*clip, *coupled, rule, *by_width, *decoupled, *scaled, rate, schedule, *fixed)


def _add_coupled_decay(weight_decay: Any, widths: Any) -> optax.GradientTransformation:
    if widths is None:
        return optax.add_decayed_weights(weight_decay, kernel_mask)

    def add(update: jax.Array, param: jax.Array, width: Any) -> jax.Array:
        return update + width.coupled_decay_scale * weight_decay * param if param.ndim > 1 else update

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, widths))


def _fix_norms() -> optax.GradientTransformation:
    """Makes an update first rescale each convolution's kernel to norm sqrt(outputs), as airbench94_muon (Jordan 2024).

    If a normalization follows, the kernel's norm only affects the relative size of a step, which this keeps constant.
    """

    def init(params: Any) -> optax.EmptyState:
        if not any(x.ndim == 4 for x in jax.tree.leaves(params)):
            raise UserError("--config.optimizer.fixed_norm: the network has no convolutions; remove the flag")
        return optax.EmptyState()

    def rescale(update: jax.Array, kernel: jax.Array) -> jax.Array:
        if kernel.ndim != 4:
            return update
        return update + (jnp.sqrt(kernel.shape[-1]) / global_norm(kernel) - 1) * kernel

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(rescale, updates, params), state

    return optax.GradientTransformation(init, update)


def _scale_by_width(rule: str, widths: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, w: w.rate_scale(rule) * u, updates, widths))


def global_norm(tree: Any) -> jax.Array:
    """Computes the Euclidean norm of all arrays of a pytree, float32 scalar, as `optax.tree.norm` does."""
    # By products: XLA:CPU's sum over all axes takes several passes, an eighth of a small autoencoder's train step.
    dot = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(sum(dot(x, x, x.ndim) for x in jax.tree.leaves(tree)))


def update_ema(ema_params: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """Computes the EMA of the parameters after update `step` (from 0): ema + (1 - d) (params - ema), in float32.

    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that the average leaves
    the initial parameters quickly.
    """
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, ema_params, 1.0 - decay_now)
