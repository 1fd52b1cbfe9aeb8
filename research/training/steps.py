"""The train step and the evaluation step, as pure functions.

    train_steps: (state, data, batches, num_steps, hparams)  -> (state, metrics of every step)
    eval_steps:  (params, model_state, carry, data, batches) -> (carry, weighted sums of each batch's metrics, values
                 of each example)

`data` is the device-resident data set, or {} if the data is streamed. `batches` hold the numbers of each step's
examples and, if the data is streamed, the examples themselves. `hparams` are the hyperparameters that are traced
arguments, not compile-time constants (`research.training.hyperparams`).

Leading axes of `batches`: k steps of a dispatch, m microbatches of a step, b examples of a microbatch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import flops, optimizers, randomness, sharding
from research.config import Config
from research.data.batch import Batch
from research.errors import UserError
from research.layers.batch_norm import momentum_of
from research.network import gather, merge_network, split_frozen, split_network
from research.randomness import Stream
from research.tasks.task import Metrics, Task
from research.training import batch_statistics, gather_dtypes, hyperparams, jit_steps, noise_scale, per_device, remat
from research.training.accumulation import mean_over_microbatches
from research.training.hyperparams import SEED, HParams
from research.training.state import TrainState

Data = dict[str, jax.Array]
Sums = tuple[Metrics, jax.Array]  # of metrics weighted by example, and of the weights


def add_sums(total: Any, part: Any, axis: int = 0) -> Any:
    """Adds the `Sums` of a dispatch's batches, on the host with k at `axis`, to `total` (None: 0), in float64."""
    added = jax.tree.map(lambda x: x.sum(axis, np.float64), part)
    return added if total is None else jax.tree.map(np.add, total, added)


class Steps:
    """The jitted steps of a task on one mesh.

    Args:
      task: the training task.
      graphdef: the model's static part.
      config: resolved; the train step uses `hparams` instead of the fields that they replace.
      mesh: the devices.

    Attributes:
      num_replicas: how many devices compute per-device gradients, or 1 (`research.training.per_device`).
      compiler_options: to compile the train steps with.

    Raises:
      UserError: `mesh.reduce_dtype` is set, but the gradients are not per-device, so that GSPMD places the reductions.
    """

    def __init__(self, task: Task, graphdef: nnx.GraphDef, config: Config, mesh: Mesh):
        self._task = task
        self._graphdef = graphdef
        self._config = config
        self._mesh = mesh
        self.num_replicas = per_device.num_replicas(task, mesh, config.examples_at_once)
        self.compiler_options = remat.compiler_options(config.remat, mesh)
        if config.mesh.reduce_dtype != "float32" and mesh.shape.get("data", 1) > self.num_replicas:
            raise UserError(
                f"--config.mesh.reduce_dtype={config.mesh.reduce_dtype}: GSPMD sums this network's gradients, in "
                "float32; leave the flag out, or declare per_device_gradients (research/training/per_device.py)"
            )
        self._loss_pair = jax.jit(self._both_losses, out_shardings=sharding.replicated(mesh))

    def _advance(
        self,
        params: Any,
        model_state: Any,
        carry: Any,
        batch: Batch,
        hparams: HParams,
        key: jax.Array,
        momentum: jax.Array | None = None,
        mode: str = "none",
        dtypes: Any = None,
    ) -> tuple[Metrics, Any, Any]:
        """Runs the task in training mode: (values of every example, model_state, carry).

        `momentum` replaces the momentum of every batch norm; `mode` is that of `remat.apply`, `dtypes` of `gather`.
        """
        arrays = gather(params, model_state, self._mesh, self._task.sharding_rules, dtypes)
        model = merge_network(self._graphdef, *arrays)
        remat.apply(model, mode)
        with hyperparams.applied(self._task, model, hparams) as task, momentum_of(model, momentum):
            values, carry = task.advance(model, batch, carry, key=key, train=True)
        frozen = split_frozen(model_state)[0]  # as they came: sharded
        return values, nnx.merge_state(frozen, split_network(model)[2]), carry

    def _loss(self, *arrays: Any, dtypes: Any = None) -> tuple[jax.Array, tuple[Any, Any, Metrics]]:
        values, model_state, carry = self._advance(*arrays, mode=self._config.remat, dtypes=dtypes)
        metrics = jax.tree.map(jnp.mean, values)
        return metrics["loss"], (model_state, carry, metrics)

    def _gradients(
        self, state: TrainState, data: Data, batch: Batch, hparams: HParams, key: jax.Array
    ) -> tuple[Any, Any, tuple[Any, Metrics]]:
        """Returns (model_state, carry, (gradient, metrics)), the last two as means over the batch, [m, b, ...]."""
        if self.num_replicas == 1:
            return self._accumulate(state, data, batch, hparams, key)
        part = P(None, sharding.BATCH_AXES)

        def on_device(state: TrainState, *args: Any) -> tuple[Any, Any, tuple[Any, Metrics]]:
            state = dataclasses.replace(state, params=sharding.vary(state.params))
            model_state, carry, means = self._accumulate(state, *args)
            return model_state, carry, per_device.mean_gradients(*means, self._mesh, self._config.mesh.reduce_dtype)

        in_specs = self._state_specs(state), P(), part, P(), P()
        mapped = per_device.on_each_device(on_device, self._mesh, in_specs, (P(), part, P()))
        return mapped(state, data, batch, hparams, key)

    def _accumulate(
        self, state: TrainState, data: Data, batch: Batch, hparams: HParams, key: jax.Array
    ) -> tuple[Any, Any, tuple[Any, Metrics]]:
        """Like `_gradients`, but only for the examples of `batch`: those of one device, or all.

        If the batch has several microbatches or replicas, the metrics include "grad_square", the mean squared norm of
        their gradients.
        """
        count = len(batch.index)

        def microbatch_grads(
            model_state: Any, carry: Any, microbatch: Batch, number: jax.Array
        ) -> tuple[Any, Any, Any]:
            examples = dataclasses.replace(microbatch.gather(data), step=state.step)
            loss = remat.grouped(self._loss, self._config.remat)
            gradient = gather_dtypes.gradient(loss, self._mesh, self._task.sharding_rules)
            arrays = state.params, model_state, carry, examples, hparams, jax.random.fold_in(key, number)
            grads, (model_state, carry, metrics) = jax.named_scope(flops.GRADIENT)(gradient)(*arrays)
            if count * self.num_replicas > 1:
                metrics["grad_square"] = jnp.square(optimizers.global_norm(grads))
            return model_state, carry, (grads, metrics)

        return mean_over_microbatches(microbatch_grads, state.model_state, state.carry, batch)

    def check_per_device(self, state: TrainState, data: Data, batches: Batch, hparams: HParams) -> None:
        """Raises `UserError` if per-device losses of the first microbatch differ from those of the whole microbatch.

        The other arguments are those of `train_steps`.
        """
        per_device.check_losses(*jax.device_get(self._loss_pair(state, data, batches, hparams)))

    def _first_losses(self, state: TrainState, data: Data, batches: Batch, hparams: HParams) -> jax.Array:
        """Returns the losses [b] of the next step's first microbatch."""
        microbatch = jax.tree.map(lambda x: x[0, 0], batches)
        batch = dataclasses.replace(microbatch.gather(data), step=state.step)
        carry = jax.tree.map(lambda x: x[0], state.carry)
        key = jax.random.fold_in(self._step_key(state, hparams), 0)
        return self._advance(state.params, state.model_state, carry, batch, hparams, key)[0]["loss"]

    def _both_losses(self, state: TrainState, *others: Any) -> tuple[jax.Array, jax.Array]:
        """Returns `_first_losses` twice: computed from the whole batch, and by each device from its part."""
        specs = self._state_specs(state), P(), P(None, None, sharding.BATCH_AXES), P()
        mapped = per_device.on_each_device(self._first_losses, self._mesh, specs, P(sharding.BATCH_AXES))
        return self._first_losses(state, *others), mapped(state, *others)

    def _state_specs(self, state: TrainState) -> TrainState:
        return dataclasses.replace(jax.tree.map(lambda _: P(), state), carry=P(None, sharding.BATCH_AXES))

    def _step_key(self, state: TrainState, hparams: HParams) -> jax.Array:
        return jax.random.fold_in(randomness.key(Stream.STEP, hparams[SEED]), state.step)

    def train_step(self, state: TrainState, data: Data, batch: Batch, hparams: HParams) -> tuple[TrainState, Metrics]:
        """Makes one update; `batch` has leaves [m, b, ...], metrics are float32 scalars.

        With `max_skipped_steps`, a step whose loss or gradient is not finite changes nothing but the step count.
        """
        key = self._step_key(state, hparams)
        model_state, carry, (grads, metrics) = self._gradients(state, data, batch, hparams, key)
        updates, opt_state = hyperparams.make_optimizer(self._config, hparams, self._task.widths).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optimizers.update_ema(ema_params, params, hparams["optimizer.ema_decay"], state.step)
        metrics["grad_norm"] = optimizers.global_norm(grads)
        if "grad_square" in metrics:
            squares = metrics.pop("grad_square"), jnp.square(metrics["grad_norm"])
            count, size = batch.index.shape
            metrics |= noise_scale.moments(*squares, size // self.num_replicas, count * size)
        new = TrainState(state.step + 1, params, model_state, carry, opt_state, ema_params, state.ema_model_state)
        if self._config.max_skipped_steps:
            # Not `optax.apply_if_finite`: it would keep the batch statistics and the carry, which may be NaN, too.
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            kept = jax.tree.map(lambda x, before: jnp.where(finite, x, before), new, state)
            new = dataclasses.replace(kept, step=new.step)
        return new, metrics

    def train_steps(
        self, state: TrainState, data: Data, batches: Batch, num_steps: jax.Array, hparams: HParams
    ) -> tuple[TrainState, Metrics]:
        """Makes `num_steps` updates in one program; `batches` has leaves [k, m, b, ...] with k >= num_steps.

        The number of steps is a traced argument, so the short dispatch at the end of an epoch needs no compilation.

        Returns:
          The state, and every metric as float32 [k], of which the first `num_steps` are set.
        """
        train_step = jax.jit(self.train_step, inline=True)  # traced once, for its shapes and in the loop

        def at(i: jax.Array) -> Batch:
            return jax.tree.map(lambda x: x[i], batches)

        def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            state, metrics = train_step(state, data, at(i), hparams)
            return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

        _, metrics = jax.eval_shape(train_step, state, data, at(jnp.int32(0)), hparams)
        capacity = len(batches.index)
        history = jax.tree.map(lambda m: jnp.zeros((capacity, *m.shape), m.dtype), metrics)
        return jax.lax.fori_loop(0, num_steps, body, (state, history))

    def estimate_statistics(
        self, state: TrainState, data: Data, batches: Batch, count: jax.Array, hparams: HParams
    ) -> tuple[TrainState, jax.Array]:
        """Calls `batch_statistics.estimate`; `batches` has leaves [1, m, b, ...]."""

        frozen = split_frozen(state.model_state)[0]

        def model_state_after(params: Any, changing: Any, carry: Any, microbatch: Batch, *others: Any) -> Any:
            examples = dataclasses.replace(microbatch.gather(data), step=state.step)
            model_state = nnx.merge_state(frozen, changing)
            return split_frozen(self._advance(params, model_state, carry, examples, hparams, *others)[1])[1]

        batch = jax.tree.map(lambda x: x[0], batches)
        return batch_statistics.estimate(model_state_after, state, batch, count, hparams)

    def eval_steps(
        self, params: Any, model_state: Any, carry: Any, data: Data, batches: Batch
    ) -> tuple[Any, Sums, Metrics]:
        """Evaluates k batches; `batches` has leaves [k, b, ...].

        Returns:
          The carry [b, ...] after the last batch; for every metric the weighted sums over the examples of each batch,
          [k, ...], and the sums of the weights [k]; and the values of `Task.per_example`, [k, b] each, with the
          examples' numbers ("index") and weights ("weight"), or {} without any.
        """
        # Seeds are the indices of first examples: the same for any dispatch size, and on every device.
        arrays = params, model_state, carry, data, batches, batches.index[:, 0]
        if self.num_replicas == 1:
            return self._evaluate(*arrays)

        def on_device(*arrays: Any) -> tuple[Any, Sums, Metrics]:
            carry, sums, examples = self._evaluate(*arrays)
            return carry, per_device.reduce(jax.lax.psum, sums, self._mesh), examples

        rows, part = P(sharding.BATCH_AXES), P(None, sharding.BATCH_AXES)
        specs = P(), P(), rows, P(), part, P()
        return per_device.on_each_device(on_device, self._mesh, specs, (rows, P(), part))(*arrays)

    def _evaluate(
        self, params: Any, model_state: Any, carry: Any, data: Data, batches: Batch, seeds: jax.Array
    ) -> tuple[Any, Sums, Metrics]:
        """Like `eval_steps`, for the examples of one device, or all; `seeds` are int [k]."""
        arrays = gather(params, model_state, self._mesh, self._task.sharding_rules)

        def body(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, tuple[Sums, Metrics]]:
            batch, seed = xs[0].gather(data), xs[1]
            model = merge_network(self._graphdef, *arrays)
            key = jax.random.fold_in(randomness.key(Stream.EVALUATION), seed)
            values, carry = self._task.advance(model, batch, carry, key=key, train=False)
            weights = batch.mask * self._task.example_weights(batch)
            examples = {name: values.pop(name) for name in self._task.per_example if name in values}
            if examples:
                examples |= {"index": batch.index, "weight": weights}
            sums = jax.tree.map(lambda value: (value.T * weights).T.sum(0), values), weights.sum()
            return carry, (sums, examples)

        carry, (sums, examples) = jax.lax.scan(body, carry, (batches, seeds))
        return carry, sums, examples

    def jit_train(self, state: TrainState) -> Any:
        """Jits `train_steps`; the state's buffers are donated."""
        return jit_steps.jit_update(self.train_steps, state, self._mesh, self.compiler_options)

    def jit_estimate(self, state: TrainState) -> Any:
        """Jits `estimate_statistics`; the state's buffers are donated."""
        return jit_steps.jit_update(self.estimate_statistics, state, self._mesh)

    def jit_eval(self, state: TrainState) -> Any:
        """Jits `eval_steps`."""
        return jit_steps.jit_eval(self.eval_steps, state, self._mesh)
