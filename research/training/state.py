"""The training state: one pytree, created already sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from research import parameter_groups, randomness, sharding, sharding_rules
from research.config import Config
from research.network import split_frozen, split_network
from research.randomness import Stream
from research.tasks.task import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, the number of steps made.
      params: trained arrays, float32.
      model_state: the model's other arrays (batch statistics, frozen parameters).
      carry: the recurrent state after each example of the newest batch, from which the next batch continues,
        [microbatches, b, ...]; {} for a task without recurrent state.
      opt_state: the optimizer's state.
      ema_params: the parameters' moving average, or None.
      ema_model_state: `model_state` with batch statistics of the averaged parameters and without frozen ones, made by
        `Steps.estimate_statistics` before an evaluation; None without an average or batch statistics.
    """

    step: jax.Array
    params: Any
    model_state: Any
    carry: Any
    opt_state: Any
    ema_params: Any
    ema_model_state: Any

    @property
    def eval_params(self) -> Any:
        """The parameters that evaluation uses."""
        return self.params if self.ema_params is None else self.ema_params

    @property
    def eval_model_state(self) -> Any:
        """The `model_state` that evaluation uses."""
        if self.ema_model_state is None:
            return self.model_state
        return nnx.merge_state(split_frozen(self.model_state)[0], self.ema_model_state)

    @property
    def all_params(self) -> Any:
        """The parameters, frozen ones included."""
        return nnx.merge_state(self.params, split_frozen(self.model_state)[0])


def abstract_state(
    task: Task, tx: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, Callable[[Any], TrainState], TrainState]:
    """As `create_state`, but abstract: allocates no arrays, and the mesh's devices need not exist.

    Returns:
      The model's static part, the function that creates the state from a seed (uint32), and the state's
      `jax.ShapeDtypeStruct`s with their shardings.

    Raises:
      UserError: as `parameter_groups.check` and `sharding_rules.check`.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: task.create_model(nnx.Rngs(config.seed))))[0]
    size = config.examples_at_once
    count = config.batch_size // size

    def init(seed: jax.Array) -> TrainState:
        rngs = nnx.Rngs(randomness.key(Stream.INITIALIZATION, seed))
        frozen = parameter_groups.selects(config.optimizer.freeze)
        _, params, model_state = split_network(task.create_model(rngs), frozen)
        # A copy: state is donated, and two leaves of it must not share a buffer.
        ema_params = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
        own_statistics = ema_params is not None and _has_batch_statistics(model_state)
        ema_model_state = jax.tree.map(jnp.copy, split_frozen(model_state)[1]) if own_statistics else None
        carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), task.initial_carry(size))
        return TrainState(jnp.int32(0), params, model_state, carry, tx.init(params), ema_params, ema_model_state)

    shapes = jax.eval_shape(init, np.uint32(config.seed))
    parameter_groups.check(config.optimizer, shapes.params, split_frozen(shapes.model_state)[0])
    sharding_rules.check(task.sharding_rules, shapes.all_params, mesh)
    placed = sharding.batch_sharding(mesh, 1)
    shardings = dataclasses.replace(
        sharding_rules.tree_shardings(shapes, shapes.all_params, task.sharding_rules, mesh),
        carry=jax.tree.map(lambda _: placed, shapes.carry),
    )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return graphdef, init, abstract


def _has_batch_statistics(model_state: Any) -> bool:
    variables = jax.tree.leaves(model_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return any(isinstance(variable, nnx.BatchStat) for variable in variables)


def create_state(
    task: Task, tx: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh, abstract: bool = False
) -> tuple[nnx.GraphDef, TrainState]:
    """Builds the model and its optimizer's state on the mesh.

    No device ever holds the whole of a sharded array: the shapes are traced first, the sharding rules are applied to
    them, and the initialization is jitted with these shardings.

    Returns:
      The model's static part (`merge_network` makes a module of it), and the state; if `abstract`, its shapes.
    """
    graphdef, init = make_init(task, tx, config, mesh)
    seed = np.uint32(config.seed)
    return graphdef, jax.eval_shape(init, seed) if abstract else init(seed)


def make_init(
    task: Task, tx: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, Callable[[Any], TrainState]]:
    """Returns the model's static part, and a jitted function that creates the state from a seed (uint32)."""
    graphdef, init, abstract = abstract_state(task, tx, config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # XLA:CPU takes seconds to optimize random number generation, too long for a program that runs once.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return graphdef, jax.jit(init, out_shardings=shardings, compiler_options=options)


def num_params(state: TrainState) -> int:
    """The number of scalars in the parameters, frozen ones included."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.all_params))


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Returns whether every float of a tree is finite, bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in floats]))
