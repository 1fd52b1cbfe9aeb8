"""A population: trials whose configs have the same signature (`training/hyperparams.py`), trained in one program.

Each slot holds the state of one member; all members share one copy of the data set on the devices. A member's result
equals that of the same config trained by itself, to float tolerance: the steps, the order of examples and the random
draws are the same.
"""

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.config import Config
from research.data.pipeline import EvalBatches, TrainBatches, batch_bytes, epoch_ends, is_resident, longest_epoch
from research.data.sources import Dataset
from research.tasks.task import Task
from research.training import batch_statistics, hyperparams, initialization, population_devices
from research.training.dispatch import DispatchSizer
from research.training.population_steps import PopulationSteps
from research.training.state import TrainState, make_init
from research.training.steps import Steps, add_sums


@dataclasses.dataclass
class Member:
    """One run of a trial: its traced hyperparameters, its batches and its progress."""

    hparams: dict[str, Any]
    batches: TrainBatches
    epoch_end_steps: list[int]
    step: int = 0
    epoch: int = 0
    diverged_at: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a member's epoch.

    Attributes:
      epoch: the number of epochs finished.
      metrics: the metrics of the validation split, as `validation_<name>`; {} if the member diverged.
      diverged_at: the step whose loss or gradient was not finite, or after which the validation loss was not; or None.
      finished: whether the member has finished or diverged.
    """

    epoch: int
    metrics: dict[str, float]
    diverged_at: int | None
    finished: bool


def place_examples(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, placed: tuple[TrainBatches, EvalBatches] | None
) -> tuple[DispatchSizer, TrainBatches, EvalBatches]:
    """Places the training and validation splits on a mesh, or shares those that are `placed` there, for any members.

    Raises:
      UserError: the batch size is larger than the training set.
    """
    assert dataset.validation is not None
    resident = is_resident(config, dataset.train, dataset.validation)
    sizer = DispatchSizer(
        config,
        streamed_bytes=0 if resident else batch_bytes(config, dataset.train),
        longest_epoch=longest_epoch(epoch_ends(dataset.num_examples, config)),
    )
    options = {"resident": resident, "capacity": sizer.capacity, "shuffle": dataset.shuffle}
    data = [split.data for split in placed] if placed else [None, None]
    batches = TrainBatches(dataset.train, config, mesh, **options, data=data[0])
    return sizer, batches, EvalBatches(dataset.validation, config, mesh, resident=resident, data=data[1])


class Population:
    """Members that train together.

    Args:
      config: the resolved config of any member.
      task: the task, built from that config.
      dataset: the data set, which must have a validation split.
      devices: the devices, over which the members are spread evenly.
      size: the number of slots, rounded up to a multiple of the number of devices.
      share_data_with: a population on the same devices; if it has the same data set, both use one copy on the devices.

    Raises:
      UserError: the batch size is larger than the training set, or as `initialization.load`.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        dataset: Dataset,
        devices: Sequence[Any],
        size: int,
        share_data_with: "Population | None" = None,
    ):
        self.size = size + -size % len(devices)
        self._task = task
        self._dataset = dataset
        self._mesh = share_data_with._mesh if share_data_with else population_devices.make_mesh(devices)
        shared = share_data_with if share_data_with and share_data_with._dataset is dataset else None
        self._members: dict[int, Member] = {}
        self._num_examples = dataset.num_examples
        epoch_end_steps = epoch_ends(self._num_examples, config)
        placed = (shared._batches, shared._validation) if shared else None
        self._sizer, self._batches, self._validation = place_examples(config, dataset, self._mesh, placed)
        self._filler_hparams = hyperparams.traced(config, epoch_end_steps[-1])
        self._filler_batches = jax.tree.map(np.zeros_like, self._batches.with_seed(0).take_local(1))
        tx = hyperparams.make_optimizer(config, self._filler_hparams, task.widths)
        graphdef, self._init = make_init(task, tx, config, self._mesh)
        self._steps = PopulationSteps(Steps(task, graphdef, config, self._mesh), self._mesh, config.batch_size)
        carry = task.initial_carry(config.examples_at_once)
        self._carry = jax.tree.map(lambda x: np.broadcast_to(x, (self.size, *x.shape)), carry)
        self._states: TrainState | None = None
        self._weights: dict[str, jax.Array] = {}  # what all members start from
        if config.init.path:
            state = self._init(np.uint32(config.seed))
            self._weights, _ = initialization.load(config.init, state, task.torch_names, len(dataset.label_names))

    @property
    def num_compilations(self) -> int:
        """The number of compilations of the train program."""
        return self._steps.train._cache_size()

    @property
    def free(self) -> list[int]:
        """The slots without a member, in the order to fill them: first those on devices with the fewest members."""
        per_device, ranked = self.size // self._mesh.size, []
        for first in range(0, self.size, per_device):
            free = [slot for slot in range(first, first + per_device) if slot not in self._members]
            ranked += zip(range(-len(free), 0), free)
        return [slot for _, slot in sorted(ranked)]

    def metric_names(self) -> list[str]:
        """Returns the names of the metrics in a report."""
        with jax.set_mesh(self._mesh):
            arrays = *self._eval_arrays(self._state_shapes()), self._validation.example()
            shapes = jax.eval_shape(self._steps.evaluate, *arrays)[1]
        sums, weight = jax.tree.map(lambda x: np.ones(x.shape[2:]), shapes)
        return list(self._task.split_metrics("validation", sums, weight))

    def start(self, slot: int, config: Config) -> None:
        """Starts a new member in a slot; `config` is resolved and has the population's signature."""
        epoch_end_steps = epoch_ends(self._num_examples, config)
        hparams = hyperparams.traced(config, epoch_end_steps[-1])
        self._members[slot] = Member(hparams, self._batches.with_seed(config.seed), epoch_end_steps)
        with jax.set_mesh(self._mesh):
            state = initialization.apply(self._init(np.uint32(config.seed)), self._weights)
            self._states = self._steps.put(self._all_states(), np.int32(slot), state)

    def stop(self, slot: int) -> None:
        """Frees a slot; a population without members holds no states in memory."""
        del self._members[slot]
        if not self._members:
            self._states = None

    def _all_states(self) -> TrainState:
        if self._states is not None:
            return self._states
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=self._steps.sharding), self._state_shapes())

    def _state_shapes(self) -> TrainState:
        shapes = jax.eval_shape(self._init, np.uint32(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.size, *x.shape), x.dtype), shapes)

    def train_epoch(self, stops: Callable[[], bool] = lambda: False) -> dict[int, Report]:
        """Trains the next epoch of every member, and evaluates it.

        `stops` is polled between dispatches; if it returns True, this returns {}, else a report for every slot in use.
        """
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

    def _left(self, member: Member) -> int:
        """Returns the number of steps to the end of the current epoch."""
        return 0 if member.diverged_at is not None else member.epoch_end_steps[member.epoch] - member.step

    def _dispatch(self, counts: dict[int, int]) -> None:
        began = time.monotonic()
        taken = {slot: self._members[slot].batches.take_local(count) for slot, count in counts.items()}
        batches = self._stack(taken, self._filler_batches)
        hparams = self._stack({slot: member.hparams for slot, member in self._members.items()}, self._filler_hparams)
        numbers = np.array([counts.get(slot, 0) for slot in range(self.size)], np.int32)
        self._states, metrics = self._steps.train(self._states, batches, numbers, hparams, self._batches.data)
        finite = np.logical_and(*(np.isfinite(values) for values in jax.device_get(metrics).values()))
        self._sizer.update(max(counts.values()), time.monotonic() - began)
        for slot, count in counts.items():
            member = self._members[slot]
            wrong = np.flatnonzero(~finite[slot, :count])
            if len(wrong):
                member.diverged_at = member.step + int(wrong[0]) + 1
            member.step += count

    def _stack(self, values: dict[int, Any], otherwise: Any) -> Any:
        """Stacks the values of all slots; `otherwise` fills those without one."""
        return jax.tree.map(lambda *xs: np.stack(xs), *(values.get(slot, otherwise) for slot in range(self.size)))

    def _estimate_statistics(self) -> None:
        """As `Training.estimate_statistics`, for every member."""
        if self._states is None or self._states.ema_model_state is None:
            return
        hparams = self._stack({slot: member.hparams for slot, member in self._members.items()}, self._filler_hparams)
        counts: Any = np.zeros(self.size, np.int32)
        for number in range(batch_statistics.NUM_STEPS):
            steps = {s: m.step - min(m.step, batch_statistics.NUM_STEPS) + number for s, m in self._members.items()}
            steps = {slot: step for slot, step in steps.items() if step < self._members[slot].step}
            taken = {slot: self._members[slot].batches.local_batch(step) for slot, step in steps.items()}
            taken = jax.tree.map(lambda x: x[None], taken)
            batch = self._stack(taken, jax.tree.map(lambda x: x[:1], self._filler_batches))
            has_step = np.isin(np.arange(self.size), list(steps))
            counts = np.where(has_step, counts, -1)  # -1: no change
            self._states, counts = self._steps.estimate(self._states, batch, counts, hparams, self._batches.data)

    def _eval_arrays(self, states: TrainState) -> tuple[Any, ...]:
        active = np.array([s in self._members and self._members[s].diverged_at is None for s in range(self.size)])
        return states.eval_params, states.eval_model_state, self._carry, active, self._validation.data

    def _reports(self) -> dict[int, Report]:
        self._estimate_statistics()
        params, model_state, carry, active, data = self._eval_arrays(self._all_states())
        total: Any = None
        for batches in self._validation:
            carry, part = self._steps.evaluate(params, model_state, carry, active, data, batches)
            total = add_sums(total, jax.device_get(part), axis=1)
        found = {}
        for slot in np.flatnonzero(active).tolist():
            sums, weight = jax.tree.map(operator.itemgetter(slot), total)
            found[slot] = self._task.split_metrics("validation", sums, weight)
        reports = {}
        for slot, member in self._members.items():
            if slot in found and not math.isfinite(found[slot]["validation_loss"]):
                member.diverged_at = member.step
            diverged = member.diverged_at is not None
            finished = diverged or member.epoch == len(member.epoch_end_steps)
            reports[slot] = Report(member.epoch, {} if diverged else found[slot], member.diverged_at, finished)
        return reports
