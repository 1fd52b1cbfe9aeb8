"""The jitted programs of a population: the steps of one run, mapped over its members."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.training import population_devices
from research.training.population_devices import AXIS
from research.training.progress import QUANTITIES
from research.training.steps import Steps


class PopulationSteps:
    """Jits the steps of all members; the leading axis of their arrays is the population's size.

    Args:
      steps: of one member.
      mesh: `population_devices.make_mesh`.
      batch_size: of a member.

    Attributes:
      sharding: of members' arrays.
      train: (states, batches, numbers of steps, hparams, data) -> (states, metrics of every step); donates states.
      estimate: (states, batches, counts, hparams, data) -> (states, counts), as `Steps.estimate_statistics`; donates
        states.
      evaluate: (params, model_state, carry, active, data, batches) -> (carry, sums), as `Steps.eval_steps`; zeros for
        members that are not active. All share the batches.
      put: (states, slot, state) -> states with `state` in `slot`; donates states.
    """

    def __init__(self, steps: Steps, mesh: Mesh, batch_size: int):
        self._steps = steps
        self._at_once = population_devices.at_once(mesh.devices.flat[0].platform, batch_size)
        self._mesh = mesh
        self.sharding = NamedSharding(mesh, P(AXIS))
        members, replicated = P(AXIS), P()
        options = {"compiler_options": steps.compiler_options, "donate": True}
        self.train: Any = self._jit(self._train, members, members, members, members, replicated, **options)
        self.estimate: Any = self._jit(self._estimate, members, members, members, members, replicated, donate=True)
        self.evaluate: Any = self._jit(self._evaluate, members, members, members, members, replicated, replicated)
        self.put: Any = jax.jit(self._put, donate_argnums=0, out_shardings=self.sharding)

    def _jit(
        self,
        function: Callable[..., Any],
        *specs: P,
        donate: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ) -> Any:
        if self._mesh.size > 1:
            # Members are independent: no collectives, and no replication for shard_map to check.
            options = {"mesh": self._mesh, "in_specs": specs, "out_specs": P(AXIS), "check_vma": False}
            function = jax.shard_map(function, **options)
        donated = (0,) if donate else ()
        return jax.jit(function, donate_argnums=donated, out_shardings=self.sharding, compiler_options=compiler_options)

    def _map(self, function: Callable[..., Any], *members: Any) -> Any:
        return population_devices.map_members(self._at_once, function)(*members)

    def _train(self, states: Any, batches: Any, counts: Any, hparams: Any, data: Any) -> Any:
        def train_member(state: Any, batches: Any, count: Any, hparams: Any) -> Any:
            state, metrics = self._steps.train_steps(state, data, batches, count, hparams)
            return state, {name: metrics[name] for name in QUANTITIES}

        return self._map(train_member, states, batches, counts, hparams)

    def _estimate(self, states: Any, batches: Any, counts: Any, hparams: Any, data: Any) -> Any:
        def estimate_member(state: Any, batches: Any, count: Any, hparams: Any) -> Any:
            return self._steps.estimate_statistics(state, data, batches, count, hparams)

        return self._map(estimate_member, states, batches, counts, hparams)

    def _evaluate(self, params: Any, model_state: Any, carry: Any, active: Any, data: Any, batches: Any) -> Any:
        def evaluate_member(params: Any, model_state: Any, carry: Any, active: Any) -> Any:
            arrays = params, model_state, carry, data, batches

            def evaluate() -> Any:
                return self._steps.eval_steps(*arrays)[:2]  # the values of each example are for plots

            shapes = jax.eval_shape(evaluate)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return jax.lax.cond(active, evaluate, lambda: zeros)

        return self._map(evaluate_member, params, model_state, carry, active)

    @staticmethod
    def _put(states: Any, slot: Any, state: Any) -> Any:
        return jax.tree.map(lambda all_, new: all_.at[slot].set(new), states, state)
