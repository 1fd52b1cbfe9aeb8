"""Maximal update parametrization (muP): the best learning rate stays the same as a network grows wider.

Yang et al. 2022, arXiv 2203.03466, table 3, gives how initial kernels and learning rates change with the width. Here a
network is compared with the same one at its `base_width`, where both are as in the config. A kernel has r_in times as
many inputs and r_out times as many outputs as there (a vector's only axis counts as outputs):

| | initial kernel | learning rate: SGD | adaptive rules | Muon |
| --- | --- | --- | --- | --- |
| input kernels, vectors (r_in = 1) | by fan-in | r_out | 1 | 1 |
| hidden kernels (r_in = r_out) | by fan-in | 1 | 1 / r_in | 1 |
| output kernels (r_out = 1) | by fan-in, / sqrt(r_in) | 1 / r_in | 1 / r_in | 1 / sqrt(r_in) |

Muon's column follows Yang et al. 2023, arXiv 2310.17813, condition 1. The condition scales updates by sqrt(out / in),
but Optax scales Muon's orthogonal updates by sqrt(max(1, out / in)). The column holds for input kernels with fewer
inputs than outputs and for output kernels with more; otherwise the learning rate also compensates Optax's factor.

Decoupled weight decay (AdamW, Lion, Muon) is not scaled: a step shrinks every kernel by the config's learning rate *
decay, at every width. The package `mup` does the same: its MuAdamW multiplies a kernel's decay by the factor that
divides its learning rate. Coupled decay is scaled by r_in / r_out, as gradients are, so that their ratio stays the
same. For SGD and momentum this equals `mup`'s MuSGD, and again rate * decay is the same at every width. For Adam with
coupled decay it differs from `mup`'s MuAdam, which multiplies the decay of hidden kernels by r_in, so that their decay
outgrows their gradient. Prefer AdamW.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

_NOT_ADAPTIVE = ("sgd", "momentum", "nesterov")  # the update is proportional to the gradient


@dataclasses.dataclass(frozen=True)
class Widths:
    """A parameter's size relative to the network of the base width.

    Attributes:
      inputs: r_in, over all axes but the last.
      outputs: r_out, over the last axis.
      ndim: the number of axes.
      shape: the ratio of outputs to inputs, at this width.
    """

    inputs: float
    outputs: float
    ndim: int
    shape: float

    @property
    def init_scale(self) -> float:
        """The factor of the initial kernel, relative to an initialization by fan-in."""
        return 1 / math.sqrt(self.inputs) if self.outputs == 1 and self.ndim > 1 else 1.0

    @property
    def coupled_decay_scale(self) -> float:
        """The factor of coupled weight decay, relative to the base width."""
        return self.inputs / self.outputs

    def rate_scale(self, rule: str) -> float:
        """Returns the factor of the learning rate, relative to the base width; `rule` is an `OptimizerConfig.name`."""
        if rule in _NOT_ADAPTIVE:
            return self.outputs / self.inputs
        if rule == "muon":
            if self.ndim == 1:  # updated by Adam, not by Muon
                return 1.0
            ratio = self.outputs / self.inputs
            return math.sqrt(ratio * max(1.0, self.shape / ratio) / max(1.0, self.shape))
        return 1 / self.inputs


@dataclasses.dataclass(frozen=True)
class Network:
    """Builds a network from its rngs, in the parametrization of its config.

    Attributes:
      create: builds the network of a config and rngs, in the standard parametrization.
      config: has the fields `width`, `parametrization` and `base_width`.
      names_in_torch: returns the names of a config's arrays in PyTorch (`Task.torch_names`); None: unknown.
    """

    create: Callable[[Any, nnx.Rngs], nnx.Module]
    config: Any
    names_in_torch: Callable[[Any], Mapping[str, tuple[str, ...]]] | None = None

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network with its initial parameters."""
        model = self.create(self.config, rngs)
        if (widths := self.widths) is not None:
            params = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda param, width: width.init_scale * param, params, widths))
        return model

    @property
    def torch_names(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the network's arrays in PyTorch, by path with dots; {}: unknown."""
        return self.names_in_torch(self.config) if self.names_in_torch else {}

    @functools.cached_property
    def widths(self) -> Any:
        """The `Widths` of every parameter, a pytree like the parameters; None: standard parametrization."""
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
