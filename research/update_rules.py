"""The update rules by name, as Optax transformations with a learning rate of 1.

Optax's rules are set up as in PyTorch, or as in their papers if PyTorch lacks them. tests/test_update_rules.py compares
ten steps of each with NumPy and with torch.optim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.config import OptimizerConfig, is_on

_MUON_ADAM_FACTOR = 0.1  # Adam updates biases and norms, with a tenth of Muon's learning rate
_LARS_TRUST = 0.001  # You et al.'s trust coefficient


def kernel_mask(params: Any) -> Any:
    """Returns True for parameters that decay: those of two or more axes (kernels, embeddings), not biases and norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _muon_dimensions(params: Any) -> Any:
    """Treats kernels [..., in, out] as matrices [all but the last axis, out]; None (Adam) for biases and norms."""
    dims = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(
        lambda x: dims(reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1) if x.ndim > 1 else None, params
    )


def make_rule(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds an update rule with a learning rate of 1.

    Args:
      config: after `optimizers.resolve`; its numbers may be traced. If the momentum is the Python number 0, SGD and
        RMSProp keep no buffer for it. Only LARS and LAMB read the weight decay, which their trust ratio includes.
    """
    # `resolve` leaves None only where the rule has no such number.
    numbers: tuple[Any, ...] = config.momentum, config.weight_decay, config.beta2, config.epsilon
    momentum, weight_decay, beta2, epsilon = numbers
    trace = momentum if is_on(momentum) else None
    adam = {"b1": momentum, "b2": beta2, "eps": epsilon}
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "sgd": lambda: optax.sgd(1.0),
        "momentum": lambda: optax.sgd(1.0, trace),
        "nesterov": lambda: optax.sgd(1.0, trace, nesterov=True),
        "adagrad": lambda: optax.chain(_scale_by_adagrad(config.initial_accumulator, epsilon), optax.scale(-1.0)),
        # PyTorch's decay, and its epsilon outside the root. Optax's default, sqrt(v + 1e-8), acts like an epsilon of
        # 1e-4, which is larger than many gradients.
        "rmsprop": lambda: optax.rmsprop(1.0, decay=beta2, eps=epsilon, eps_in_sqrt=False, momentum=trace),
        "adam": lambda: optax.adam(1.0, **adam),
        "adamw": lambda: optax.adam(1.0, **adam),
        "lion": lambda: optax.lion(1.0, b1=momentum, b2=beta2, weight_decay=0.0),
        # Optax's form of You et al. 2017, equation 6: the ratio is |w| / |g + decay w|, not |w| / (|g| + decay |w|).
        # Biases and norms have no trust ratio of norms, only the constant trust coefficient.
        "lars": lambda: optax.lars(
            _LARS_TRUST, weight_decay, kernel_mask, 1.0, epsilon, trust_ratio_mask=kernel_mask, momentum=momentum
        ),
        # You et al. 2020, algorithm 2, with its bias correction and without its bounds on |w|.
        "lamb": lambda: optax.lamb(1.0, **adam, weight_decay=weight_decay, mask=kernel_mask),
        # Optax corrects the bias of Nesterov's average; Jordan's code and torch.optim.Muon do not. In the first steps
        # this gives the gradient more weight relative to the momentum.
        "muon": lambda: optax.contrib.muon(
            1.0,
            beta=momentum,
            eps=epsilon,
            adam_b2=beta2,
            adam_learning_rate=_MUON_ADAM_FACTOR,
            muon_weight_dimension_numbers=_muon_dimensions,
        ),
    }
    return rules[config.name]()


def _scale_by_adagrad(start: Any, eps: Any) -> optax.GradientTransformation:
    """AdaGrad as in PyTorch: g / (sqrt(start + sum of g^2) + eps); Duchi et al. 2011, figure 1, start from 0.

    `optax.adagrad` adds eps inside the root, where 1e-10 acts as 1e-5 does outside.
    """

    def init(params: Any) -> optax.ScaleByRssState:
        return optax.ScaleByRssState(optax.tree.full_like(params, start))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        sums = jax.tree.map(lambda g, s: s + jnp.square(g), updates, state.sum_of_squares)
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, sums), optax.ScaleByRssState(sums)

    return optax.GradientTransformation(init, update)
