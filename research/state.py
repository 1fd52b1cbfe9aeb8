"""The training state: one pytree, created already sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from research import sharding
from research.config import Config
from research.tasks.task import Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: trained arrays, float32.
      model_state: the model's other arrays (batch statistics, frozen kernels).
      carry: what each example of the newest batch left to the one that continues it, [microbatches, b, ...]; {} for a
        task without memory.
      opt_state: the optimiser's state.
      ema_params: the parameters' moving average, or None.
    """

    step: jax.Array
    params: Any
    model_state: Any
    carry: Any
    opt_state: Any
    ema_params: Any

    @property
    def eval_params(self) -> Any:
        """The parameters that evaluation uses."""
        return self.params if self.ema_params is None else self.ema_params


def abstract_state(
    task: Task, tx: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, Callable[[jax.Array], TrainState], TrainState]:
    """What `create_state` makes, without an array of it: the mesh's devices need not be there.

    Returns:
      The model's static part, the function that makes the state from a key, and the state's `jax.ShapeDtypeStruct`s
      with their shardings.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: task.create_model(nnx.Rngs(config.seed))))[0]
    size = config.examples_at_once
    count = config.batch_size // size

    def init(key: jax.Array) -> TrainState:
        _, params, model_state = nnx.split(task.create_model(nnx.Rngs(key)), nnx.Param, ...)
        # A copy: state is donated, and two leaves of it must not share a buffer.
        ema_params = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
        carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), task.initial_carry(size))
        return TrainState(jnp.int32(0), params, model_state, carry, tx.init(params), ema_params)

    shapes = jax.eval_shape(init, jax.random.key(config.seed))
    placed = sharding.batch_sharding(mesh, 1)
    shardings = dataclasses.replace(
        sharding.tree_shardings(shapes, mesh), carry=jax.tree.map(lambda _: placed, shapes.carry)
    )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return graphdef, init, abstract


def create_state(
    task: Task, tx: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Builds the model and its optimiser's state on the mesh.

    No device ever holds an array whole that the mesh splits: shapes are traced first, their shardings follow from the
    rules, and the initialisation is jitted with them.

    Returns:
      The model's static part (`nnx.merge` makes a module of it), and the state.
    """
    graphdef, init = make_init(task, tx, config, mesh)
    return graphdef, init(jax.random.key(config.seed))


def make_init(
    task: Task, tx: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, Callable[[jax.Array], TrainState]]:
    """The model's static part, and what makes the state from a seed's key: compiled once for all seeds."""
    graphdef, init, abstract = abstract_state(task, tx, config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # Random numbers take XLA:CPU's optimiser long to compile (seconds) for a program that runs once.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return graphdef, jax.jit(init, out_shardings=shardings, compiler_options=options)


def num_params(state: TrainState) -> int:
    """The number of trained scalars."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Whether no float of a tree is NaN or infinite, bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in floats]))
