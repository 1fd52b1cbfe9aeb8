"""Recurrent networks over characters; `RNN` builds the network of an `RNNConfig`.

| name | layer | source |
| --- | --- | --- |
| simple | x -> h | Elman 1990 |
| gru | x -> h | Cho et al. 2014, arXiv 1406.1078, reset after the product |
| lstm | x -> h | Hochreiter & Schmidhuber 1997, with a forget gate, initially open |
| mingru | x + minGRU(norm x), then x + MLP(norm x) | Feng et al. 2024, arXiv 2410.01201, section 3.1 |
| lru | x + GLU(gelu(LRU(norm x))) | Orvieto et al. 2023, arXiv 2303.06349, section 3 and appendix A |

The first three are sequential. The last two are linear in their state, hence parallel over time. Dropout acts on the
output of a layer (the first three; Zaremba et al. 2014, arXiv 1409.2329) or on the residual that it adds (the last
two), never on the recurrent state.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.export import is_symbolic_dim
from jax.sharding import PartitionSpec as P

from research import sharding
from research.config import MeshConfig, RecurrentConfig, RNNConfig
from research.errors import UserError
from research.layers import recurrence
from research.layers.dropout import Dropout
from research.layers.linear_recurrence import linear_recurrence
from research.models.blocks import LECUN, Linear, rows_product
from research.sharding import BATCH_AXES, SEQUENCE

Carry = tuple[recurrence.State, ...]  # the state of each layer, arrays float32 [b, units]

# The widths of the state's arrays, in units of config.width; the lru's is complex: real and imaginary parts.
_STATE_WIDTHS = {"simple": (1,), "gru": (1,), "lstm": (1, 1), "mingru": (1,), "lru": (2,)}
PARALLEL = ("mingru", "lru")


def check_mesh(mesh: MeshConfig, config: RecurrentConfig, length: int, what: str) -> None:
    """Raises `UserError` if the mesh shards the time axis, but the cell is sequential or `length` is no multiple.

    Args:
      mesh: the sizes of the mesh.
      config: the layers.
      length: the number of time steps.
      what: has this length, for the message.
    """
    if config.name not in PARALLEL:
        sharding.refuse_sequence(mesh, f"--config.model.name={config.name}")
    shards = mesh.sequence
    if shards == -1:
        shards = sharding.mesh_shape(mesh, jax.device_count())[sharding.AXES.index(SEQUENCE)]
    if length % shards:
        raise UserError(
            f"{what} cannot be split evenly over the {shards} devices of --config.mesh.sequence: use a multiple of "
            f"{shards}, or another number of devices"
        )


def initial_state(name: str, width: int, batch_size: int) -> recurrence.State:
    """Returns the initial state of a layer: zeros."""
    return tuple(jnp.zeros((batch_size, size * width)) for size in _STATE_WIDTHS[name])


def initial_carry(config: RecurrentConfig, batch_size: int) -> Carry:
    """Returns the network's initial state."""
    return (initial_state(config.name, config.width, batch_size),) * config.layers


class RNN(nnx.Module):
    """Embedding, recurrent layers, and logits of the next character.

    Args:
      config: the layers.
      vocabulary_size: the number of characters.
      rngs: for initialization.
    """

    per_device_gradients = True

    def __init__(self, config: RNNConfig, vocabulary_size: int, rngs: nnx.Rngs):
        width, self.dtype = config.width, jnp.dtype(config.dtype)
        # Sequential cells project the embedding, so it should have unit variance. A tied kernel must give small logits.
        # Residual layers normalize their input, but under muP the residual stream must not vanish as the width grows.
        unit = config.parametrization == "mup" or (config.name not in PARALLEL and not config.tied)
        embedding_init = nnx.initializers.normal(1.0 if unit else width**-0.5)
        self.embedding = nnx.Embed(vocabulary_size, width, embedding_init=embedding_init, rngs=rngs)
        self.layers = nnx.List([LAYERS[config.name](config, rngs) for _ in range(config.layers)])
        # The residual stream is normalized once more before the logits.
        self.norm = nnx.RMSNorm(width, rngs=rngs) if config.name in PARALLEL else None
        self.bias = nnx.Param(jnp.zeros(vocabulary_size))
        self.kernel = None if config.tied else nnx.Param(LECUN(rngs.params(), (width, vocabulary_size)))

    def __call__(
        self, tokens: jax.Array, carry: Carry, first: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """Computes the logits after each character.

        Args:
          tokens: int [b, T].
          carry: the state before the first character: `initial_carry`, or the carry that an earlier call returned.
          first: bool [b], whether to reset the state.
          train: whether dropout is active.
          key: for dropout.

        Returns:
          Float32 [b, T, vocabulary_size], and the carry.
        """
        x, carry = self._outputs(tokens, carry, first, train=train, key=key)
        return self.logits(x).transpose(1, 0, 2), carry

    def token_features(
        self, tokens: jax.Array, carry: Carry, first: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """As a call, but returns what `logits` is applied to (`research.tasks.token_loss`), [b, T, width]."""
        x, carry = self._outputs(tokens, carry, first, train=train, key=key)
        return x.transpose(1, 0, 2), carry

    def logits(self, features: jax.Array) -> jax.Array:
        """Computes the logits of features [..., width]: float32 [..., vocabulary_size]."""
        kernel = self.embedding.embedding[...].T if self.kernel is None else self.kernel[...]
        logits = rows_product(features.astype(self.dtype), kernel.astype(self.dtype)) + self.bias[...]
        return logits.astype(jnp.float32)

    def _outputs(
        self, tokens: jax.Array, carry: Carry, first: jax.Array, *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, Carry]:
        """Computes the outputs of the layers, [T, b, width], and the carry."""
        carry = jax.tree.map(lambda h: jnp.where(first[:, None], 0, h), carry)
        keys = [None] * len(self.layers) if key is None else list(jax.random.split(key, len(self.layers)))
        table = self.embedding.embedding[...]
        x, new_carry = shard_over_time(table[tokens.T]), []
        for layer, state, layer_key in zip(self.layers, carry, keys):
            if isinstance(layer, Recurrent):
                # The first layer's input depends on the character only. If the vocabulary is smaller than the batch,
                # project the vocabulary and look up the result: this saves three of an LSTM's five large products.
                project_table = not new_carry and not is_symbolic_dim(tokens.size) and len(table) < tokens.size
                inputs = layer.inputs(table)[tokens.T] if project_table else layer.inputs(x)
                x, state = layer(inputs, state, train=train, key=layer_key)
            else:
                x, state = layer(x, state, train=train, key=layer_key)
            new_carry.append(state)
        return x if self.norm is None else self.norm(x), tuple(new_carry)


def shard_over_time(x: jax.Array) -> jax.Array:
    """Shards the time axis of x [T, b, width] over the mesh axis `sequence`, if there is one and it divides T."""
    if sharding.time_shards(len(x)) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(SEQUENCE, BATCH_AXES))


def _linear(inputs: int, outputs: int, config: RecurrentConfig, rngs: nnx.Rngs, *, use_bias: bool = True) -> Linear:
    return Linear(inputs, outputs, use_bias=use_bias, dtype=jnp.dtype(config.dtype), rngs=rngs)


class Recurrent(nnx.Module):
    """A layer of a sequential cell, called with the projection of all time steps' inputs at once (`inputs`)."""

    def __init__(self, cell: Callable[..., Any], gates: int, config: RecurrentConfig, rngs: nnx.Rngs):
        width = config.width
        self.cell, self.dtype = cell, jnp.dtype(config.dtype)
        # The GRU's reset gate multiplies only one of the two biases; in the other cells they would add up to one.
        self.inputs = _linear(width, gates * width, config, rngs, use_bias=cell is recurrence.gru)
        orthogonal = nnx.initializers.orthogonal()
        parts = [orthogonal(rngs.params(), (width, width)) for _ in range(gates)]
        self.kernel = nnx.Param(jnp.concatenate(parts, axis=1))
        bias = jnp.zeros(gates * width)
        if cell is recurrence.lstm:  # forget gate initially open (Jozefowicz et al. 2015)
            bias = bias.at[width : 2 * width].set(1.0)
        self.bias = nnx.Param(bias)
        self.dropout = Dropout(config.dropout, batch_axis=1)

    def __call__(
        self, x: jax.Array, state: recurrence.State, *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, recurrence.State]:
        kernel = self.kernel[...].astype(self.dtype)
        x, state = self.cell(x, state, kernel, self.bias[...])
        return self.dropout(x, train=train, key=key), state


class MinGRU(nnx.Module):
    """minGRU, h = (1 - z) h + z n, followed by a feed-forward layer.

    The gate z (a sigmoid) and the candidate n (linear) are functions of the input alone. Feng et al. compute in
    logarithms because their scan divides by products of 1 - z, which underflow. `linear_recurrence` only multiplies by
    them, where an underflow is harmless (the state is forgotten), so logarithms are not needed and n may be negative.
    """

    def __init__(self, config: RecurrentConfig, rngs: nnx.Rngs):
        width = config.width
        self.norm, self.mlp_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.inputs = _linear(width, 2 * width, config, rngs)
        self.outputs = _linear(width, width, config, rngs, use_bias=False)
        self.expand, self.contract = _linear(width, 4 * width, config, rngs), _linear(4 * width, width, config, rngs)
        self.dropout = Dropout(config.dropout, batch_axis=1)

    def __call__(
        self, x: jax.Array, state: recurrence.State, *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, recurrence.State]:
        keys = (None, None) if key is None else jax.random.split(key)
        z, n = jnp.split(self.inputs(self.norm(x)).astype(jnp.float32), 2, axis=-1)
        z = jax.nn.sigmoid(z)
        hidden = linear_recurrence(1 - z, z * n, state[0])
        x = x + self.dropout(self.outputs(hidden), train=train, key=keys[0])
        y = self.contract(nnx.gelu(self.expand(self.mlp_norm(x))))
        return x + self.dropout(y, train=train, key=keys[1]), (hidden[-1],)


class LRU(nnx.Module):
    """The linear recurrent unit: h = lambda h + gamma B x, y = Re(C h) + D x, with lambda, B, C, h complex.

    lambda = exp(-exp(nu) + i exp(theta)) lies within the unit circle for any nu (section 3.3). It is initialized with
    0.9 <= abs(lambda) <= 0.999, and gamma = sqrt(1 - abs(lambda)^2) keeps the scale of h near that of its inputs
    (section 3.4).
    """

    def __init__(self, config: RecurrentConfig, rngs: nnx.Rngs):
        width = config.width
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        low, high = 0.9, 0.999
        squares = jax.random.uniform(rngs.params(), (width,), minval=low**2, maxval=high**2)
        phases = jax.random.uniform(rngs.params(), (width,), minval=1e-3, maxval=2 * math.pi)
        self.nu = nnx.Param(jnp.log(-0.5 * jnp.log(squares)))
        self.theta = nnx.Param(jnp.log(phases))
        self.gamma = nnx.Param(0.5 * jnp.log(1 - squares))
        # B and C as real matrices: real and imaginary parts of B side by side, those of C stacked.
        self.inputs = _linear(width, 2 * width, config, rngs, use_bias=False)
        self.outputs = _linear(2 * width, width, config, rngs, use_bias=False)
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.gate = _linear(width, 2 * width, config, rngs)
        self.dropout = Dropout(config.dropout, batch_axis=1)

    def __call__(
        self, x: jax.Array, state: recurrence.State, *, train: bool, key: jax.Array | None
    ) -> tuple[jax.Array, recurrence.State]:
        keys = (None, None) if key is None else jax.random.split(key)
        inputs = self.norm(x)
        decay = jnp.exp(jax.lax.complex(-jnp.exp(self.nu[...]), jnp.exp(self.theta[...])))
        driven = _complex(self.inputs(inputs)) * jnp.exp(self.gamma[...])
        hidden = linear_recurrence(decay, driven, _complex(state[0]))
        hidden = jnp.concatenate([hidden.real, hidden.imag], -1)
        y = nnx.gelu(self.outputs(hidden) + self.skip[...] * inputs)
        y = nnx.glu(self.gate(self.dropout(y, train=train, key=keys[0])))
        return x + self.dropout(y, train=train, key=keys[1]), (hidden[-1],)


def _complex(x: jax.Array) -> jax.Array:
    """Converts [..., 2 * units], real parts followed by imaginary parts, to complex64 [..., units]."""
    real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jax.lax.complex(real, imaginary)


LAYERS: dict[str, Callable[[RecurrentConfig, nnx.Rngs], nnx.Module]] = {
    "simple": lambda config, rngs: Recurrent(recurrence.simple, 1, config, rngs),
    "gru": lambda config, rngs: Recurrent(recurrence.gru, 3, config, rngs),
    "lstm": lambda config, rngs: Recurrent(recurrence.lstm, 4, config, rngs),
    "mingru": MinGRU,
    "lru": LRU,
}
