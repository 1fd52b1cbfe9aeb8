"""The train step and the evaluation step: two pure functions, and how they are jitted.

    train_steps: (state, data, inputs, num_steps, given)    -> (state, metrics of every step)
    eval_steps:  (params, model_state, carry, data, inputs) -> (carry, weighted sums of each batch's metrics)

`data` is the device-resident data set ({} where it streams); `inputs` say which examples a step takes, or carry them;
`given` are the hyperparameters that are not part of the program (`research.training.hyperparams`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import optimizers, randomness, sharding
from research.config import Config
from research.data.pipeline import Batch
from research.errors import UserError
from research.layers import batch_norm
from research.layers.dropout import set_rate
from research.network import merge_network, split_network
from research.randomness import Stream
from research.tasks.task import Metrics, Task
from research.training import batch_statistics, hyperparams, noise_scale, per_device
from research.training.hyperparams import DROPOUT, SEED, Inputs
from research.training.state import TrainState


def fetch(data: Batch, inputs: Batch) -> Batch:
    """The batch that `inputs` ({"index": int32 [b], ...}) name: resident examples are gathered on the device."""
    return {**inputs, **{name: array[inputs["index"]] for name, array in data.items()}}


class Steps:
    """The jitted steps of a task on one mesh.

    Args:
      task: what is learned.
      graphdef: the model's static part.
      config: resolved; the inputs that a train step is given stand before what it says.
      mesh: the devices.

    Attributes:
      num_replicas: how many devices make gradients of their own (`research.training.per_device`).

    Raises:
      UserError: gradients are to travel in bfloat16, but no device makes one of its own (`per_device.py`).
    """

    def __init__(self, task: Task, graphdef: nnx.GraphDef, config: Config, mesh: Mesh):
        self._task = task
        self._graphdef = graphdef
        self._config = config
        self._mesh = mesh
        self.num_replicas = per_device.num_replicas(task, mesh)
        if config.mesh.reduce_dtype != "float32" and mesh.shape.get("data", 1) > self.num_replicas:
            raise UserError(
                f"--config.mesh.reduce_dtype={config.mesh.reduce_dtype}: the compiler sums this network's gradients, "
                "in float32; leave it out, or declare per_device_gradients (research/training/per_device.py)"
            )
        self._loss_pair = jax.jit(self._both_losses, out_shardings=sharding.replicated(mesh))

    def _advance(
        self,
        params: Any,
        model_state: Any,
        carry: Any,
        batch: Batch,
        given: Inputs,
        key: jax.Array,
        momentum: jax.Array | None = None,
    ) -> tuple[Metrics, Any, Any]:
        """(values of every example, model_state, carry) of training, or with another momentum of every batch norm."""
        model = merge_network(self._graphdef, sharding.gather(params, self._mesh), model_state)
        task = self._task.with_inputs(given)
        if DROPOUT in given:
            set_rate(model, given[DROPOUT])
        with batch_norm.momentum_of(model, momentum):
            values, carry = task.advance(model, batch, carry, key=key, train=True)
        if DROPOUT in given:
            set_rate(model, 1.0)  # no array, or it would be part of the model's state
        return values, split_network(model)[2], carry

    def _loss(
        self, params: Any, model_state: Any, carry: Any, batch: Batch, given: Inputs, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any, Metrics]]:
        values, model_state, carry = self._advance(params, model_state, carry, batch, given, key)
        metrics = {name: jnp.mean(value) for name, value in values.items() if name != "weight"}
        return metrics["loss"], (model_state, carry, metrics)

    def _gradients(
        self, state: TrainState, data: Batch, inputs: Batch, given: Inputs, key: jax.Array
    ) -> tuple[Any, Any, tuple[Any, Metrics]]:
        """(model_state, carry, (gradient, metrics)): means over the batch."""
        if self.num_replicas == 1:
            return self._accumulate(state, data, inputs, given, key)
        part = P(None, sharding.BATCH_AXES)

        def on_device(state: TrainState, *args: Any) -> tuple[Any, Any, tuple[Any, Metrics]]:
            state = dataclasses.replace(state, params=sharding.vary(state.params))
            model_state, carry, means = self._accumulate(state, *args)
            return model_state, carry, per_device.mean_gradients(*means, self._mesh, self._config.mesh.reduce_dtype)

        in_specs = self._state_specs(state), P(), part, P(), P()
        mapped = per_device.on_each_device(on_device, self._mesh, in_specs, (P(), part, P()))
        return mapped(state, data, inputs, given, key)

    def _accumulate(
        self, state: TrainState, data: Batch, inputs: Batch, given: Inputs, key: jax.Array
    ) -> tuple[Any, Any, tuple[Any, Metrics]]:
        """(model_state, carry, (gradient, metrics)): the means over the microbatches, the leading axis of `inputs`.

        Where a batch has several parts, "grad_square" is among the metrics: the squared norm of a part's gradient.
        """
        count = inputs["index"].shape[0]

        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and in the loop
        def microbatch_grads(
            model_state: Any, carry: Any, batch_inputs: Batch, number: jax.Array
        ) -> tuple[Any, Any, Any]:
            batch = {**fetch(data, batch_inputs), "step": state.step}
            gradient = jax.grad(self._loss, has_aux=True)
            microbatch_key = jax.random.fold_in(key, number)
            grads, (model_state, carry, metrics) = gradient(
                state.params, model_state, carry, batch, given, microbatch_key
            )
            if count * self.num_replicas > 1:
                metrics["grad_square"] = jnp.square(optimizers.global_norm(grads))
            return model_state, carry, (grads, metrics)

        first_carry, first_inputs = jax.tree.map(lambda x: x[0], (state.carry, inputs))
        if count == 1:
            model_state, carry, means = microbatch_grads(state.model_state, first_carry, first_inputs, jnp.int32(0))
            return model_state, jax.tree.map(lambda x: x[None], carry), means

        def accumulate(scanned: Any, xs: Any) -> tuple[Any, Any]:
            model_state, sums = scanned
            number, carry, batch_inputs = xs
            model_state, carry, values = microbatch_grads(model_state, carry, batch_inputs, number)
            return (model_state, jax.tree.map(jnp.add, sums, values)), carry

        shapes = jax.eval_shape(microbatch_grads, state.model_state, first_carry, first_inputs, jnp.int32(0))[2]
        xs = (jnp.arange(count), state.carry, inputs)
        (model_state, sums), carry = jax.lax.scan(
            accumulate, (state.model_state, jax.tree.map(jnp.zeros_like, shapes)), xs
        )
        return model_state, carry, jax.tree.map(lambda x: x / count, sums)

    def check_per_device(self, state: TrainState, data: Batch, inputs: Batch, given: Inputs) -> None:
        """Raises `UserError` where the devices' losses of a step's first microbatch are not those of the whole.

        `inputs` are those of `train_steps`.
        """
        per_device.check_losses(*jax.device_get(self._loss_pair(state, data, inputs, given)))

    def _first_losses(self, state: TrainState, data: Batch, inputs: Batch, given: Inputs) -> jax.Array:
        """The losses [b] of the examples of the next step's first microbatch."""
        batch = {**fetch(data, jax.tree.map(lambda x: x[0, 0], inputs)), "step": state.step}
        carry = jax.tree.map(lambda x: x[0], state.carry)
        key = jax.random.fold_in(self._step_key(state, given), 0)
        return self._advance(state.params, state.model_state, carry, batch, given, key)[0]["loss"]

    def _both_losses(self, state: TrainState, *others: Any) -> tuple[jax.Array, jax.Array]:
        """(those of the whole batch, those that each device has of its part)."""
        specs = self._state_specs(state), P(), P(None, None, sharding.BATCH_AXES), P()
        mapped = per_device.on_each_device(self._first_losses, self._mesh, specs, P(sharding.BATCH_AXES))
        return self._first_losses(state, *others), mapped(state, *others)

    def _state_specs(self, state: TrainState) -> TrainState:
        return dataclasses.replace(jax.tree.map(lambda _: P(), state), carry=P(None, sharding.BATCH_AXES))

    def _step_key(self, state: TrainState, given: Inputs) -> jax.Array:
        return jax.random.fold_in(randomness.key(Stream.STEP, given[SEED]), state.step)

    def train_step(self, state: TrainState, data: Batch, inputs: Batch, given: Inputs) -> tuple[TrainState, Metrics]:
        """One update. `inputs` has leaves [m, b, ...]: m microbatches of b examples; metrics are float32 scalars.

        Where steps may be skipped, one whose loss or gradient is not finite changes nothing but the number of steps.
        `optax.apply_if_finite` would leave the statistics and the memory that such a batch has spoilt.
        """
        key = self._step_key(state, given)
        model_state, carry, (grads, metrics) = self._gradients(state, data, inputs, given, key)
        updates, opt_state = hyperparams.make_optimizer(self._config, given, self._task.widths).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optimizers.update_ema(ema_params, params, given["optimizer.ema_decay"], state.step)
        metrics["grad_norm"] = optimizers.global_norm(grads)
        if "grad_square" in metrics:
            squares = metrics.pop("grad_square"), jnp.square(metrics["grad_norm"])
            count, size = inputs["index"].shape
            metrics |= noise_scale.moments(*squares, size // self.num_replicas, count * size)
        new = TrainState(state.step + 1, params, model_state, carry, opt_state, ema_params, state.ema_model_state)
        if self._config.max_skipped_steps:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            kept = jax.tree.map(lambda x, before: jnp.where(finite, x, before), new, state)
            new = dataclasses.replace(kept, step=new.step)
        return new, metrics

    def train_steps(
        self, state: TrainState, data: Batch, inputs: Batch, num_steps: jax.Array, given: Inputs
    ) -> tuple[TrainState, Metrics]:
        """`num_steps` updates in one program; `inputs` has leaves [k, m, b, ...] with k >= num_steps.

        The number of steps is an input, so one compilation serves the short dispatch at an epoch's end too.

        Returns:
          The state, and every metric as float32 [k], of which the first `num_steps` are set.
        """

        train_step = jax.jit(self.train_step, inline=True)  # traced once, for its shapes and in the loop

        def at(i: jax.Array) -> Batch:
            return jax.tree.map(lambda x: x[i], inputs)

        def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            state, metrics = train_step(state, data, at(i), given)
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

        _, metrics = jax.eval_shape(train_step, state, data, at(jnp.int32(0)), given)
        capacity = inputs["index"].shape[0]
        history = jax.tree.map(lambda m: jnp.zeros((capacity, *m.shape), m.dtype), metrics)
        return jax.lax.fori_loop(0, num_steps, body, (state, history))

    def estimate_statistics(
        self, state: TrainState, data: Batch, inputs: Batch, count: jax.Array, given: Inputs
    ) -> tuple[TrainState, jax.Array]:
        """`batch_statistics.estimate`, with leaves [1, m, b, ...] of `inputs`."""

        def model_state_after(params: Any, model_state: Any, carry: Any, inputs: Batch, *others: Any) -> Any:
            batch = {**fetch(data, inputs), "step": state.step}
            return self._advance(params, model_state, carry, batch, given, *others)[1]

        one_step = jax.tree.map(lambda x: x[0], inputs)
        return batch_statistics.estimate(model_state_after, state, one_step, count, given)

    def eval_steps(self, params: Any, model_state: Any, carry: Any, data: Batch, inputs: Batch) -> tuple[Any, Metrics]:
        """Sums over the examples of each batch; `inputs` has leaves [k, b, ...], "mask" [k, b] is 0 for padding.

        Returns:
          The carry [b, ...] after the last batch; for every metric [b, ...] the sums of each batch, each example times
          its weight, [k, ...]; and "weight" [k], the sums of the weights.
        """
        # By the first example's number: the same however the batches are dispatched, and on every device.
        arrays = params, model_state, carry, data, inputs, inputs["index"][:, 0]
        if self.num_replicas == 1:
            return self._evaluate(*arrays)

        def on_device(*arrays: Any) -> tuple[Any, Metrics]:
            carry, sums = self._evaluate(*arrays)
            return carry, per_device.reduce(jax.lax.psum, sums, self._mesh)

        rows, part = P(sharding.BATCH_AXES), P(None, sharding.BATCH_AXES)
        specs = P(), P(), rows, P(), part, P()
        return per_device.on_each_device(on_device, self._mesh, specs, (rows, P()))(*arrays)

    def _evaluate(
        self, params: Any, model_state: Any, carry: Any, data: Batch, inputs: Batch, seeds: jax.Array
    ) -> tuple[Any, Metrics]:
        """`eval_steps` of the examples here; `seeds` are int [k]."""
        params = sharding.gather(params, self._mesh)

        def body(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, Metrics]:
            batch_inputs, seed = xs
            model = merge_network(self._graphdef, params, model_state)
            key = jax.random.fold_in(randomness.key(Stream.EVALUATION), seed)
            values, carry = self._task.advance(model, fetch(data, batch_inputs), carry, key=key, train=False)
            weight = batch_inputs["mask"] * values.pop("weight", 1.0)
            sums = {name: (value.T * weight).T.sum(0) for name, value in values.items()}
            return carry, sums | {"weight": weight.sum()}

        return jax.lax.scan(body, carry, (inputs, seeds))

    def jit_train(self, state: TrainState) -> Any:
        """`train_steps` jitted with its shardings; the state's buffers are donated."""
        return self._jit_with_state(self.train_steps, state)

    def jit_estimate(self, state: TrainState) -> Any:
        """`estimate_statistics` jitted with its shardings; the state's buffers are donated."""
        return self._jit_with_state(self.estimate_statistics, state)

    def _jit_with_state(self, function: Callable[..., Any], state: TrainState) -> Any:
        """Jits (state, data, inputs, int32 scalar, given) -> (state, what all devices have)."""
        whole = sharding.replicated(self._mesh)
        state_shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(
            function,
            in_shardings=(state_shardings, whole, sharding.batch_sharding(self._mesh, 2), whole, whole),
            out_shardings=(state_shardings, whole),
            donate_argnums=0,
        )

    def jit_eval(self, state: TrainState) -> Any:
        """`eval_steps` jitted with its shardings."""
        whole = sharding.replicated(self._mesh)
        shardings = jax.tree.map(lambda x: x.sharding, (state.eval_params, state.eval_model_state))
        rows = sharding.batch_sharding(self._mesh, 0)
        return jax.jit(
            self.eval_steps,
            in_shardings=(*shardings, rows, whole, sharding.batch_sharding(self._mesh, 1)),
            out_shardings=(rows, whole),
        )
