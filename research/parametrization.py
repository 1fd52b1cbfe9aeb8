"""The maximal update parametrization: a learning rate that stays the best one as a network grows wider.

Yang et al. 2022, arXiv 2203.03466, table 3: how initial kernels and learning rates change with the width. Here a
network is compared with the same at its `base_width`, where both are what the config says; along the axes that differ
it is r times as wide, r_in for a kernel's inputs and r_out for its outputs (a vector's only axis counts as outputs):

| | initial kernel | learning rate: SGD | Adam and its like | Muon |
| --- | --- | --- | --- | --- |
| input kernels, vectors (r_in = 1) | by fan-in | r_out | 1 | 1 |
| hidden kernels (r_in = r_out) | by fan-in | 1 | 1 / r_in | 1 |
| output kernels (r_out = 1) | by fan-in, / sqrt(r_in) | 1 / r_in | 1 / r_in | 1 / sqrt(r_in) |

Muon's column is Yang et al. 2023, arXiv 2310.17813, condition 1: Optax scales its orthogonal updates by
sqrt(max(1, out / in)), where the condition has sqrt(out / in). It stands for input kernels with fewer inputs than
outputs and output kernels with more; for others the rate makes up for Optax's factor at the two widths as well.

Decoupled weight decay (AdamW, Lion, Muon) does not follow the table: a step shrinks every kernel by the config's
learning rate * decay, at every width. So it is in the package `mup`, whose MuAdamW multiplies a kernel's decay by what
it divides the learning rate by. Coupled decay is scaled by r_in / r_out, as gradients are, so that it stays the same
part of them. For SGD and momentum this is `mup`'s MuSGD, and again rate * decay is the same at every width. For Adam
with coupled decay it is not `mup`'s MuAdam, which multiplies the decay of hidden kernels by r_in: their decay would
outgrow their gradient. Prefer AdamW.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

_BY_GRADIENT = ("sgd", "momentum", "nesterov")  # all others but Muon divide by the gradient's size


@dataclasses.dataclass(frozen=True)
class Widths:
    """How many times as wide as at the base width a parameter is.

    Attributes:
      inputs, outputs: along its last axis but one (and those before it), and along its last.
      ndim: its number of axes.
      shape: its outputs over its inputs, at this width.
    """

    inputs: float
    outputs: float
    ndim: int
    shape: float

    @property
    def init_scale(self) -> float:
        """By how much the initial kernel differs from one drawn by its fan-in."""
        return 1 / math.sqrt(self.inputs) if self.outputs == 1 and self.ndim > 1 else 1.0

    @property
    def coupled_decay_scale(self) -> float:
        """By how much weight decay that is added to the gradient differs from that at the base width."""
        return self.inputs / self.outputs

    def rate_scale(self, rule: str) -> float:
        """By how much the learning rate of an `OptimizerConfig.name` differs from the one at the base width."""
        if rule in _BY_GRADIENT:
            return self.outputs / self.inputs
        if rule == "muon":
            if self.ndim == 1:  # vectors go by Adam
                return 1.0
            ratio = self.outputs / self.inputs
            return math.sqrt(ratio * max(1.0, self.shape / ratio) / max(1.0, self.shape))
        return 1 / self.inputs


@dataclasses.dataclass(frozen=True)
class Network:
    """Builds a network from its rngs, in the parametrization of its config.

    Attributes:
      create: builds the network of a config, by the standard parametrization.
      config: it has `width`, `parametrization` and `base_width`.
    """

    create: Callable[[Any, nnx.Rngs], nnx.Module]
    config: Any

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network with its initial parameters."""
        model = self.create(self.config, rngs)
        if (widths := self.widths) is not None:
            params = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda param, width: width.init_scale * param, params, widths))
        return model

    @functools.cached_property
    def widths(self) -> Any:
        """The `Widths` of every parameter, as a tree like the parameters'; None: standard parametrization."""
        if self.config.parametrization == "standard":
            return None
        base = dataclasses.replace(self.config, width=self.config.base_width)
        shapes = [
            nnx.state(nnx.eval_shape(lambda config=config: self.create(config, nnx.Rngs(0))), nnx.Param)
            for config in (self.config, base)
        ]
        return jax.tree.map(_widths, *shapes)


def _widths(leaf: jax.ShapeDtypeStruct, base: jax.ShapeDtypeStruct) -> Widths:
    *inputs, outputs = (size / base_size for size, base_size in zip(leaf.shape, base.shape))
    *fan_in, fan_out = leaf.shape
    return Widths(math.prod(inputs), outputs, len(leaf.shape), fan_out / math.prod(fan_in))
