"""A population of members that are each trained on a mesh of several devices, with the programs of a single run.

A mesh trains one member at a time; meshes of disjoint devices train at the same time, each in its own thread. If there
are more members than meshes (the seeds of a trial), those of a mesh take turns, an epoch each, and wait on the host.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from research import sharding
from research.config import Config
from research.data.pipeline import epoch_ends
from research.data.sources import Dataset
from research.tasks.task import Task
from research.training import batch_statistics, hyperparams, initialization, population_devices
from research.training.population import Member, Report, place_examples
from research.training.progress import QUANTITIES
from research.training.state import make_init
from research.training.steps import Steps, add_sums

_Metrics = dict[str, float]


@dataclasses.dataclass
class _MeshMember(Member):
    """A member, with its train state: on the devices, or on the host while it waits."""

    state: Any = None


class _Trainer:
    """The programs of one mesh and its copy of the data set; the arguments are those of `MeshPopulation`."""

    def __init__(self, config: Config, task: Task, dataset: Dataset, devices: Sequence[Any], shared: "_Trainer | None"):
        if not task.parallel_over_time:
            sharding.refuse_sequence(config.mesh, "this task")
        self._mesh = sharding.make_mesh(config, devices)
        self._config, self._task, self._dataset = config, task, dataset
        epoch_end_steps = epoch_ends(dataset.num_examples, config)
        placed = (shared._batches, shared._validation) if shared else None
        self._sizer, self._batches, self._validation = place_examples(config, dataset, self._mesh, placed)
        tx = hyperparams.make_optimizer(config, hyperparams.traced(config, epoch_end_steps[-1]), task.widths)
        graphdef, self._init = make_init(task, tx, config, self._mesh)
        self._abstract: Any = jax.eval_shape(self._init, np.uint32(0))  # with the shardings of a state
        self._steps = Steps(task, graphdef, config, self._mesh)
        self.train: Any = self._steps.jit_train(self._abstract)
        self._estimate = self._steps.jit_estimate(self._abstract)
        self._evaluate = self._steps.jit_eval(self._abstract)
        self._weights: dict[str, jax.Array] | None = self._load_weights()

    def _load_weights(self) -> dict[str, jax.Array]:
        """Loads the weights that all members start from; {}: none."""
        if not self._config.init.path:
            return {}
        num_classes = len(self._dataset.label_names)
        return initialization.load(self._config.init, self._abstract, self._task.torch_names, num_classes)[0]

    def metric_names(self) -> list[str]:
        """As `Population.metric_names`."""
        arrays = (
            self._abstract.eval_params,
            self._abstract.eval_model_state,
            self._task.initial_carry(self._config.examples_at_once),
        )
        with jax.set_mesh(self._mesh):
            shapes = jax.eval_shape(self._evaluate, *arrays, self._validation.data, self._validation.example())[1]
        sums, weight = jax.tree.map(lambda x: np.ones(x.shape[1:]), shapes)
        return list(self._task.split_metrics("validation", sums, weight))

    def start(self, config: Config) -> _MeshMember:
        """Returns a new member, with its initial state on the devices."""
        epoch_end_steps = epoch_ends(self._dataset.num_examples, config)
        hparams = hyperparams.traced(config, epoch_end_steps[-1])
        if self._weights is None:
            self._weights = self._load_weights()
        with jax.set_mesh(self._mesh):
            state = initialization.apply(self._init(np.uint32(config.seed)), self._weights)
        member = _MeshMember(hparams, self._batches.with_seed(config.seed), epoch_end_steps, state=state)
        self._check_per_device(member)
        return member

    def free_weights(self) -> None:
        """Frees the memory of the weights that members start from, until the next one starts."""
        self._weights = None

    def _check_per_device(self, member: _MeshMember) -> None:
        if self._steps.num_replicas > 1:
            with jax.set_mesh(self._mesh):
                arrays = self._batches.data, member.batches.batch(0), member.hparams
                self._steps.check_per_device(member.state, *arrays)

    def train_epoch(self, member: _MeshMember, stops: Callable[[], bool]) -> _Metrics | None:
        """Trains and evaluates the next epoch of a member; returns its metrics, {} if it diverged, None if stopped."""
        with jax.set_mesh(self._mesh):
            while member.diverged_at is None and (left := member.epoch_end_steps[member.epoch] - member.step):
                if stops():
                    return None
                self._dispatch(member, min(self._sizer.num_steps, left))
            if member.diverged_at is not None:
                return {}
            if member.epoch == 0:
                self._check_per_device(member)  # once more, with trained parameters, as `Loop.save`
            metrics = self._validate(member)
        if not math.isfinite(metrics["validation_loss"]):
            member.diverged_at = member.step
            return {}
        member.epoch += 1
        return metrics

    def _dispatch(self, member: _MeshMember, count: int) -> None:
        began = time.monotonic()
        arrays = self._batches.data, member.batches.take(count), np.int32(count), member.hparams
        member.state, metrics = self.train(member.state, *arrays)
        finite = np.all([np.isfinite(jax.device_get(metrics[name])[:count]) for name in QUANTITIES], axis=0)
        self._sizer.update(count, time.monotonic() - began)
        if not finite.all():
            member.diverged_at = member.step + int(np.flatnonzero(~finite)[0]) + 1
        member.step += count

    def _validate(self, member: _MeshMember) -> _Metrics:
        if member.state.ema_model_state is not None:
            newest = member.batches, member.step, member.hparams
            member.state = batch_statistics.estimate_from_newest(self._estimate, member.state, *newest)
        params, model_state = member.state.eval_params, member.state.eval_model_state
        carry = self._task.initial_carry(self._config.examples_at_once)
        carry = jax.device_put(carry, sharding.batch_sharding(self._mesh, 0))
        total: Any = None
        for batches in self._validation:
            carry, part, _ = self._evaluate(params, model_state, carry, self._validation.data, batches)
            total = add_sums(total, jax.device_get(part))
        return self._task.split_metrics("validation", *total)

    @contextlib.contextmanager
    def on_devices(self, member: _MeshMember, waits: bool) -> Iterator[None]:
        """A context within which a member's state is on the devices; if it `waits`, it is on the host otherwise."""
        if waits:
            shardings = jax.tree.map(lambda x: x.sharding, self._abstract)
            member.state = jax.device_put(member.state, shardings)
        yield
        if waits:
            member.state = jax.device_get(member.state)


class MeshPopulation:
    """Members that each train on a mesh; has the interface of `Population`.

    Args:
      config: the resolved config of any member; its mesh is that of each.
      task: the task, built from that config.
      dataset: the data set, which must have a validation split.
      devices: the devices, of which each mesh has the next few.
      size: the number of slots, rounded up to a multiple of the number of meshes.
      share_data_with: a population on the same meshes; if it has the same data set, both use one copy on the devices.

    Raises:
      UserError: as `sharding.make_mesh`, `Training` and `initialization.load`.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        dataset: Dataset,
        devices: Sequence[Any],
        size: int,
        share_data_with: "MeshPopulation | None" = None,
    ):
        count = population_devices.devices_per_member(config.mesh, len(devices))
        meshes = [devices[first : first + count] for first in range(0, len(devices), count)]
        self.size = size + -size % len(meshes)
        self._dataset = dataset
        shares = share_data_with is not None and share_data_with._dataset is dataset
        shared = share_data_with._trainers if share_data_with and shares else [None] * len(meshes)
        self._trainers = [_Trainer(config, task, dataset, *pair) for pair in zip(meshes, shared, strict=True)]
        self._members: dict[int, _MeshMember] = {}

    @property
    def num_compilations(self) -> int:
        """The number of compilations of the train program, one for each mesh."""
        return sum(trainer.train._cache_size() for trainer in self._trainers)

    @property
    def free(self) -> list[int]:
        """The slots without a member, in the order to fill them: one after another on each mesh."""
        slots = [slot for slot in range(self.size) if slot not in self._members]
        return sorted(slots, key=lambda slot: (slot // len(self._trainers), slot))

    def _trainer(self, slot: int) -> _Trainer:
        return self._trainers[slot % len(self._trainers)]

    def metric_names(self) -> list[str]:
        """Returns the names of the metrics in a report."""
        return self._trainers[0].metric_names()

    def start(self, slot: int, config: Config) -> None:
        """Starts a new member in a slot; `config` is resolved and has the population's signature."""
        self._members[slot] = self._trainer(slot).start(config)
        if self._waits:
            self._members[slot].state = jax.device_get(self._members[slot].state)

    def stop(self, slot: int) -> None:
        """Frees a slot; a population without members holds no states and no weights in memory."""
        del self._members[slot]
        if not self._members:
            for trainer in self._trainers:
                trainer.free_weights()

    @property
    def _waits(self) -> bool:
        """True if the members of a mesh take turns."""
        return self.size > len(self._trainers)

    def train_epoch(self, stops: Callable[[], bool] = lambda: False) -> dict[int, Report]:
        """As `Population.train_epoch`."""

        def train_members(first: int) -> dict[int, _Metrics | None]:
            found: dict[int, _Metrics | None] = {}
            for slot in sorted(set(range(first, self.size, len(self._trainers))) & self._members.keys()):
                with self._trainer(slot).on_devices(self._members[slot], self._waits):
                    found[slot] = self._trainer(slot).train_epoch(self._members[slot], stops)
            return found

        with ThreadPoolExecutor(len(self._trainers)) as threads:
            parts = list(threads.map(train_members, range(len(self._trainers))))
        metrics = {slot: values for part in parts for slot, values in part.items()}
        if None in metrics.values():
            return {}
        return {slot: self._report(self._members[slot], values or {}) for slot, values in metrics.items()}

    @staticmethod
    def _report(member: _MeshMember, metrics: _Metrics) -> Report:
        finished = member.diverged_at is not None or member.epoch == len(member.epoch_end_steps)
        return Report(member.epoch, metrics, member.diverged_at, finished)
