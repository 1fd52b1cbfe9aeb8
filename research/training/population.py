"""A population: trials whose configs have one signature (`training/hyperparams.py`), trained together in one program.

Each slot of it holds the state of one member. What lies on the devices for all of them, the data set, lies there once.
A member's result is that of the same config trained alone, to float tolerance: the same steps, the same order of
examples, the same draws.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research.config import Config
from research.data.pipeline import EvalBatches, TrainBatches, epoch_ends, is_resident, longest_epoch
from research.data.sources import Dataset
from research.tasks.task import Task
from research.training import batch_statistics, hyperparams, population_devices
from research.training.dispatch import DispatchSizer
from research.training.population_devices import AXIS
from research.training.progress import QUANTITIES
from research.training.state import TrainState, make_init
from research.training.steps import Steps


@dataclasses.dataclass
class _Member:
    """One trial: its inputs, its examples, and how far it is."""

    given: dict[str, Any]
    batches: TrainBatches
    ends: list[int]
    step: int = 0
    epoch: int = 0
    diverged_at: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a member did in an epoch.

    Attributes:
      epoch: epochs finished.
      figures: the validation split's, as `validation_<name>`; {} if it diverged.
      diverged_at: the step whose loss or gradient was not finite, or after which the validation loss was not; or None.
      finished: whether there is nothing left to train.
    """

    epoch: int
    figures: dict[str, float]
    diverged_at: int | None
    finished: bool


class Population:
    """Members that train together.

    Args:
      config: resolved; any of the members'.
      task: what is learned; built from that config.
      dataset: the examples; it has a validation split.
      devices: over which the members are spread evenly.
      size: the number of slots, which is made a multiple of that of devices.
      beside: a population on the same devices, whose data set is used where it is the same object.

    Raises:
      UserError: the batch size is larger than the training set.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        dataset: Dataset,
        devices: Sequence[Any],
        size: int,
        beside: "Population | None" = None,
    ):
        assert dataset.validation is not None
        self.size = size + -size % len(devices)
        self._task = task
        self._dataset = dataset
        self._mesh = population_devices.make_mesh(devices) if beside is None else beside._mesh
        shared = beside if beside and beside._dataset is dataset else None
        self._members: dict[int, _Member] = {}
        self._num_examples = len(next(iter(dataset.train.values())))
        ends = epoch_ends(self._num_examples, config.batch_size, config.num_epochs)
        resident = is_resident(config, dataset.train, dataset.validation)
        self._sizer = DispatchSizer(config, resident=resident, longest_epoch=longest_epoch(ends))
        options = {"resident": resident, "capacity": self._sizer.capacity, "shuffle": dataset.shuffle}
        data = (shared._batches.data, shared._validation.data) if shared else (None, None)
        self._batches = TrainBatches(dataset.train, config, self._mesh, **options, data=data[0])
        self._validation = EvalBatches(dataset.validation, config, self._mesh, resident=resident, data=data[1])
        self._given = hyperparams.inputs(config, ends[-1])
        self._zeros = jax.tree.map(np.zeros_like, self._batches.of_seed(0).take_local(1))
        tx = hyperparams.make_optimizer(config, self._given, task.widths)
        graphdef, self._init = make_init(task, tx, config, self._mesh)
        self._jit(Steps(task, graphdef, config, self._mesh), config.batch_size)
        carry = task.initial_carry(config.examples_at_once)
        self._carry = jax.tree.map(lambda x: np.broadcast_to(x, (self.size, *x.shape)), carry)
        self._states: TrainState | None = None

    def _jit(self, steps: Steps, batch_size: int) -> None:
        at_once = population_devices.at_once(self._mesh.devices.flat[0].platform, batch_size)
        members, whole = P(AXIS), P()

        def spread(function: Callable[..., Any], *specs: P) -> Callable[..., Any]:
            # Members know nothing of each other, so nothing is to be checked or communicated between devices.
            options = {"mesh": self._mesh, "in_specs": specs, "out_specs": members, "check_vma": False}
            return jax.shard_map(function, **options) if self._mesh.size > 1 else function

        def train(states: Any, inputs: Any, counts: Any, given: Any, data: Any) -> Any:
            def one(state: Any, inputs: Any, count: Any, given: Any) -> Any:
                state, metrics = steps.train_steps(state, data, inputs, count, given)
                return state, {name: metrics[name] for name in QUANTITIES}

            return population_devices.each(at_once, one)(states, inputs, counts, given)

        def evaluate(params: Any, model_state: Any, carry: Any, active: Any, data: Any, inputs: Any) -> Any:
            def one(params: Any, model_state: Any, carry: Any, active: Any) -> Any:
                arrays = params, model_state, carry, data, inputs
                shapes = jax.eval_shape(steps.eval_steps, *arrays)
                zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                return jax.lax.cond(active, lambda: steps.eval_steps(*arrays), lambda: zeros)

            return population_devices.each(at_once, one)(params, model_state, carry, active)

        def put(states: Any, slot: Any, state: Any) -> Any:
            return jax.tree.map(lambda all_, one: all_.at[slot].set(one), states, state)

        def estimate(states: Any, inputs: Any, counts: Any, given: Any, data: Any) -> Any:
            def one(state: Any, inputs: Any, count: Any, given: Any) -> Any:
                return steps.estimate_statistics(state, data, inputs, count, given)

            return population_devices.each(at_once, one)(states, inputs, counts, given)

        placed = NamedSharding(self._mesh, members)
        spread_estimate = spread(estimate, members, members, members, members, whole)
        self._estimate = jax.jit(spread_estimate, donate_argnums=0, out_shardings=placed)
        spread_train = spread(train, members, members, members, members, whole)
        spread_eval = spread(evaluate, members, members, members, members, whole, whole)
        self._train: Any = jax.jit(spread_train, donate_argnums=0, out_shardings=placed)
        self._eval = jax.jit(spread_eval, out_shardings=placed)
        self._put = jax.jit(put, donate_argnums=0, out_shardings=placed)
        self._placed = placed

    @property
    def num_compilations(self) -> int:
        """How many times the train program was compiled."""
        return self._train._cache_size()

    @property
    def free(self) -> list[int]:
        """The slots without a member, in the order to fill them: on the emptiest device first."""
        each, ranked = self.size // self._mesh.size, []
        for first in range(0, self.size, each):
            free = [slot for slot in range(first, first + each) if slot not in self._members]
            ranked += zip(range(-len(free), 0), free)
        return [slot for _, slot in sorted(ranked)]

    def figure_names(self) -> list[str]:
        """The names of what a report's `figures` has."""
        with jax.set_mesh(self._mesh):
            arrays = *self._eval_arrays(self._state_shapes()), next(iter(self._validation))
            shapes = jax.eval_shape(self._eval, *arrays)[1]
        sums = {name: np.ones(x.shape[2:]) for name, x in shapes.items()}
        return list(self._task.figures("validation", sums))

    def start(self, slot: int, config: Config) -> None:
        """Puts a new member at its first step into a slot; `config` is resolved and has the population's signature."""
        ends = epoch_ends(self._num_examples, config.batch_size, config.num_epochs)
        given = hyperparams.inputs(config, ends[-1])
        self._members[slot] = _Member(given, self._batches.of_seed(config.seed), ends)
        with jax.set_mesh(self._mesh):
            state = self._init(np.uint32(config.seed))
            self._states = self._put(self._all_states(), np.int32(slot), state)

    def stop(self, slot: int) -> None:
        """Frees a slot; without members the population takes no memory for states."""
        del self._members[slot]
        if not self._members:
            self._states = None

    def _all_states(self) -> TrainState:
        if self._states is not None:
            return self._states
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=self._placed), self._state_shapes())

    def _state_shapes(self) -> TrainState:
        shapes = jax.eval_shape(self._init, np.uint32(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype), shapes)

    def train_epoch(self, stops: Callable[[], bool] = lambda: False) -> dict[int, Report]:
        """Every member's next epoch; returns what each did, by slot, or {} where `stops` said so between dispatches."""
        while pending := {s: m for s, m in self._members.items() if self._left(m)}:
            if stops():
                return {}
            with jax.set_mesh(self._mesh):
                self._dispatch(
                    {slot: min(self._sizer.num_steps, self._left(member)) for slot, member in pending.items()}
                )
        for member in self._members.values():
            member.epoch += member.diverged_at is None
        with jax.set_mesh(self._mesh):
            return self._reports()

    def _left(self, member: _Member) -> int:
        """Steps to the end of the epoch under way."""
        return 0 if member.diverged_at is not None else member.ends[member.epoch] - member.step

    def _dispatch(self, counts: dict[int, int]) -> None:
        began = time.monotonic()
        taken = {slot: self._members[slot].batches.take_local(count) for slot, count in counts.items()}
        inputs = self._stack(taken, self._zeros)
        given = self._stack({slot: member.given for slot, member in self._members.items()}, self._given)
        numbers = np.array([counts.get(slot, 0) for slot in range(self.size)], np.int32)
        self._states, metrics = self._train(self._states, inputs, numbers, given, self._batches.data)
        finite = np.logical_and(*(np.isfinite(values) for values in jax.device_get(metrics).values()))
        self._sizer.update(max(counts.values()), time.monotonic() - began)
        for slot, count in counts.items():
            member = self._members[slot]
            wrong = np.flatnonzero(~finite[slot, :count])
            if len(wrong):
                member.diverged_at = member.step + int(wrong[0]) + 1
            member.step += count

    def _stack(self, values: dict[int, Any], otherwise: Any) -> Any:
        return jax.tree.map(lambda *xs: np.stack(xs), *(values.get(slot, otherwise) for slot in range(self.size)))

    def _estimate_statistics(self) -> None:
        """As a run does before it evaluates."""
        if self._states is None or self._states.ema_model_state is None:
            return
        given = self._stack({slot: member.given for slot, member in self._members.items()}, self._given)
        counts: Any = np.zeros(self.size, np.int32)
        for number in range(batch_statistics.NUM_STEPS):
            steps = {s: m.step - min(m.step, batch_statistics.NUM_STEPS) + number for s, m in self._members.items()}
            steps = {slot: step for slot, step in steps.items() if step < self._members[slot].step}
            taken = {slot: self._members[slot].batches.step_inputs(step) for slot, step in steps.items()}
            taken = {slot: {name: x[None] for name, x in inputs.items()} for slot, inputs in taken.items()}
            inputs = self._stack(taken, {name: x[:1] for name, x in self._zeros.items()})
            has_step = np.isin(np.arange(self.size), list(steps))
            counts = np.where(has_step, counts, -1)
            self._states, counts = self._estimate(self._states, inputs, counts, given, self._batches.data)

    def _eval_arrays(self, states: TrainState) -> tuple[Any, ...]:
        active = np.array([s in self._members and self._members[s].diverged_at is None for s in range(self.size)])
        return states.eval_params, states.eval_model_state, self._carry, active, self._validation.data

    def _reports(self) -> dict[int, Report]:
        self._estimate_statistics()
        params, model_state, carry, active, data = self._eval_arrays(self._all_states())
        sums: dict[int, dict[str, Any]] = {slot: {} for slot in np.flatnonzero(active).tolist()}
        for inputs in self._validation:
            carry, part = self._eval(params, model_state, carry, active, data, inputs)
            part = jax.device_get(part)
            for slot, summed in sums.items():
                for name, value in part.items():
                    summed[name] = summed.get(name, 0.0) + value[slot].sum(0, np.float64)
        found = {slot: self._task.figures("validation", summed) for slot, summed in sums.items()}
        reports = {}
        for slot, member in self._members.items():
            if slot in found and not math.isfinite(found[slot]["validation_loss"]):
                member.diverged_at = member.step
            diverged = member.diverged_at is not None
            finished = diverged or member.epoch == len(member.ends)
            reports[slot] = Report(member.epoch, {} if diverged else found[slot], member.diverged_at, finished)
        return reports
