"""The train step and the evaluation step: two pure functions, and how they are jitted.

    train_steps: (state, data, inputs, num_steps, given)    -> (state, metrics of every step)
    eval_steps:  (params, model_state, carry, data, inputs) -> (carry, weighted sums of each batch's metrics)

`data` is the device-resident data set ({} where it streams); `inputs` say which examples a step takes, or carry them;
`given` are the hyperparameters that are not part of the program (`research.hyperparams`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research import hyperparams, noise_scale, optimizers, sharding
from research.config import Config
from research.hyperparams import DROPOUT, SEED, Inputs
from research.layers.dropout import set_rate
from research.state import TrainState
from research.tasks.task import Batch, Metrics, Task


def fetch(data: Batch, inputs: Batch) -> Batch:
    """The batch that `inputs` ({"index": int32 [b], ...}) name: resident examples are gathered on the device."""
    return {**inputs, **{name: array[inputs["index"]] for name, array in data.items()}}


class Steps:
    """The jitted steps of one task on one mesh.

    Args:
      task: what is learned.
      graphdef: the model's static part.
      config: resolved; the inputs that a train step is given stand before what it says.
      mesh: the devices.
    """

    def __init__(self, task: Task, graphdef: nnx.GraphDef, config: Config, mesh: Mesh):
        self._task = task
        self._graphdef = graphdef
        self._config = config
        self._mesh = mesh
        # The devices that each make a gradient of their own: with parameters split, the partitioner knows better.
        self._parts = mesh.shape["data"] if mesh.shape["data"] == mesh.size else 1

    def _loss(
        self, params: Any, model_state: Any, carry: Any, batch: Batch, given: Inputs, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any, Metrics]]:
        model = nnx.merge(self._graphdef, sharding.gather(params, self._mesh), model_state, copy=True)
        task = self._task.with_inputs(given)
        if DROPOUT in given:
            set_rate(model, given[DROPOUT])
        values, carry = task.advance(model, batch, carry, key=key, train=True)
        if DROPOUT in given:
            set_rate(model, 1.0)  # no array, or it would be part of the model's state
        metrics = {name: jnp.mean(value) for name, value in values.items() if name != "weight"}
        return metrics["loss"], (nnx.split(model, nnx.Param, ...)[2], carry, metrics)

    def _gradients(
        self, state: TrainState, data: Batch, inputs: Batch, given: Inputs, key: jax.Array
    ) -> tuple[Any, Any, tuple[Any, Metrics]]:
        """(model_state, carry, (gradient, metrics)): means over the batch.

        Under data parallelism each device takes its part of every microbatch, adds up its own gradients, and only their
        sums travel: the partitioner would send each microbatch's.
        """
        if self._parts == 1:
            return self._accumulate(state, data, inputs, given, key)
        part = P(None, sharding.BATCH_AXES)

        def on_device(*args: Any) -> tuple[Any, Any, tuple[Any, Metrics]]:
            model_state, carry, means = self._accumulate(*args)
            return model_state, carry, self._mean_over_devices(*means)

        in_specs = (dataclasses.replace(jax.tree.map(lambda _: P(), state), carry=part), P(), part, P(), P())
        # What check_vma guards is differentiation through shard_map; here it is within.
        return jax.shard_map(
            on_device, mesh=self._mesh, in_specs=in_specs, out_specs=(P(), part, P()), check_vma=False
        )(state, data, inputs, given, key)

    def _mean_over_devices(self, grads: Any, metrics: Metrics) -> tuple[Any, Metrics]:
        """One all-reduce, of the gradients as `reduce_dtype`."""
        mean = functools.partial(self._reduced, jax.lax.pmean)
        dtype = self._config.mesh.reduce_dtype
        if dtype == "float32":
            return mean((grads, metrics))
        rounded = mean(jax.tree.map(lambda x: x.astype(dtype), grads))
        return jax.tree.map(lambda x, like: x.astype(like.dtype), rounded, grads), mean(metrics)

    def _reduced(self, reduce: Callable[..., Any], tree: Any) -> Any:
        """The mean or the sum over the devices, in one all-reduce.

        XLA joins the all-reduces of a tree. But on the CPU it still hands them to the network one by one, at a few
        milliseconds each however small they are, so there they are made one vector.
        """
        if self._mesh.devices.flat[0].platform != "cpu":
            return reduce(tree, sharding.BATCH_AXES)
        flat, unflatten = ravel_pytree(tree)
        return unflatten(reduce(flat, sharding.BATCH_AXES))

    def _accumulate(
        self, state: TrainState, data: Batch, inputs: Batch, given: Inputs, key: jax.Array
    ) -> tuple[Any, Any, tuple[Any, Metrics]]:
        """(model_state, carry, (gradient, metrics)): the means over the microbatches, the leading axis of `inputs`.

        Where a batch has several parts, "grad_square" is among the metrics: the squared norm of a part's gradient.
        """
        count = inputs["index"].shape[0]

        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and in the loop
        def one(model_state: Any, carry: Any, batch_inputs: Batch, key: jax.Array) -> tuple[Any, Any, Any]:
            batch = {**fetch(data, batch_inputs), "step": state.step}
            gradient = jax.grad(self._loss, has_aux=True)
            grads, (model_state, carry, metrics) = gradient(state.params, model_state, carry, batch, given, key)
            if count * self._parts > 1:
                metrics["grad_square"] = jnp.square(optimizers.global_norm(grads))
            return model_state, carry, (grads, metrics)

        first_carry, first_inputs = jax.tree.map(lambda x: x[0], (state.carry, inputs))
        if count == 1:
            model_state, carry, means = one(state.model_state, first_carry, first_inputs, key)
            return model_state, jax.tree.map(lambda x: x[None], carry), means

        def accumulate(scanned: Any, xs: Any) -> tuple[Any, Any]:
            model_state, sums = scanned
            number, carry, batch_inputs = xs
            model_state, carry, values = one(model_state, carry, batch_inputs, jax.random.fold_in(key, number))
            return (model_state, jax.tree.map(jnp.add, sums, values)), carry

        shapes = jax.eval_shape(one, state.model_state, first_carry, first_inputs, key)[2]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        xs = (jnp.arange(count), state.carry, inputs)
        (model_state, sums), carry = jax.lax.scan(accumulate, (state.model_state, zeros), xs)
        return model_state, carry, jax.tree.map(lambda x: x / count, sums)

    def train_step(self, state: TrainState, data: Batch, inputs: Batch, given: Inputs) -> tuple[TrainState, Metrics]:
        """One update. `inputs` has leaves [m, b, ...]: m microbatches of b examples; metrics are float32 scalars.

        Where steps may be skipped, one whose loss or gradient is not finite changes nothing but the number of steps.
        `optax.apply_if_finite` would leave the statistics and the memory that such a batch has spoilt.
        """
        key = jax.random.fold_in(jax.random.key(given[SEED]), state.step)
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
            metrics |= noise_scale.moments(*squares, size // self._parts, count * size)
        new = TrainState(state.step + 1, params, model_state, carry, opt_state, ema_params)
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

    def eval_steps(self, params: Any, model_state: Any, carry: Any, data: Batch, inputs: Batch) -> tuple[Any, Metrics]:
        """Sums over the examples of each batch; `inputs` has leaves [k, b, ...], "mask" [k, b] is 0 for padding.

        Returns:
          The carry [b, ...] after the last batch; for every metric [b, ...] the sums of each batch, each example times
          its weight, [k, ...]; and "weight" [k], the sums of the weights.
        """
        # By the first example's number: the same however the batches are dispatched, and on every device.
        arrays = params, model_state, carry, data, inputs, inputs["index"][:, 0]
        if self._parts == 1:
            return self._evaluate(*arrays)

        def on_device(*arrays: Any) -> tuple[Any, Metrics]:
            carry, sums = self._evaluate(*arrays)
            return carry, self._reduced(jax.lax.psum, sums)

        rows, part = P(sharding.BATCH_AXES), P(None, sharding.BATCH_AXES)
        return jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(P(), P(), rows, P(), part, P()),
            out_specs=(rows, P()),
            check_vma=False,
        )(*arrays)

    def _evaluate(
        self, params: Any, model_state: Any, carry: Any, data: Batch, inputs: Batch, seeds: jax.Array
    ) -> tuple[Any, Metrics]:
        """`eval_steps` of the examples here; `seeds` are int [k]."""
        params = sharding.gather(params, self._mesh)

        def body(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, Metrics]:
            batch_inputs, seed = xs
            model = nnx.merge(self._graphdef, params, model_state, copy=True)
            key = jax.random.fold_in(jax.random.key(0), seed)
            values, carry = self._task.advance(model, fetch(data, batch_inputs), carry, key=key, train=False)
            weight = batch_inputs["mask"] * values.pop("weight", 1.0)
            sums = {name: (value.T * weight).T.sum(0) for name, value in values.items()}
            return carry, sums | {"weight": weight.sum()}

        return jax.lax.scan(body, carry, (inputs, seeds))

    def jit_train(self, state: TrainState) -> Any:
        """`train_steps` jitted with its shardings; the state's buffers are donated."""
        whole = sharding.replicated(self._mesh)
        state_shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(
            self.train_steps,
            in_shardings=(state_shardings, whole, sharding.batch_sharding(self._mesh, 2), whole, whole),
            out_shardings=(state_shardings, whole),
            donate_argnums=0,
        )

    def jit_eval(self, state: TrainState) -> Any:
        """`eval_steps` jitted with its shardings."""
        whole = sharding.replicated(self._mesh)
        shardings = jax.tree.map(lambda x: x.sharding, (state.eval_params, state.model_state))
        rows = sharding.batch_sharding(self._mesh, 0)
        return jax.jit(
            self.eval_steps,
            in_shardings=(*shardings, rows, whole, sharding.batch_sharding(self._mesh, 1)),
            out_shardings=(rows, whole),
        )
