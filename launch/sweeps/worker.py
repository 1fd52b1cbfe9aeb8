"""A sweep worker: claims trials, groups those that share a compiled program, and trains each group as a population."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from launch.sweeps.search_space import SearchSpace, check_value
from launch.sweeps.trials import DIVERGED_AT, REASON, Study
from research import config as config_lib
from research import optimizers
from research.config import Config, DatasetConfig
from research.data.sources import Dataset
from research.errors import NonFiniteLossError, UserError, as_out_of_memory_error
from research.experiment import Experiment
from research.process.signals import Signals, StoppedError
from research.tasks.task import Task
from research.training import hyperparams
from research.training.mesh_population import MeshPopulation
from research.training.population import Population, Report

FIGURES, SEED_VALUES, FIELDS = "figures", "seed_values", "fields"
_FAILURES_IN_A_ROW = 10
_MAX_DATASETS, _MAX_POPULATIONS = 4, 16  # kept in memory; populations per data set
_DIVERGED = "the loss or the gradient became NaN or infinite"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The settings of a sweep.

    Attributes:
      experiment: the experiment that is trained.
      config: the unresolved config, to which each trial applies its values.
      space: the search space.
      metric: the metric that ranks the trials, as in "validation_loss".
      trials: the number of trials.
      seeds: runs of each trial, whose mean is its value; the first has the config's seed.
      size: runs that train together, or take turns on a mesh.
      devices: the devices that train them.
      single_run_devices: the devices for the best trial's command, so that it rounds as its trial did; None: all.
      devices_per_run: the size of the mesh over which each run trains; 1: no mesh.
    """

    experiment: Experiment
    config: Config
    space: SearchSpace
    metric: str
    trials: int
    seeds: int
    size: int
    devices: Sequence[Any]
    single_run_devices: Sequence[Any] | None = None
    devices_per_run: int = 1

    @property
    def maximizes(self) -> bool:
        """True if larger values of the metric are better."""
        return self.metric.endswith("accuracy")

    def population(
        self, config: Config, task: Task, dataset: Dataset, size: int, share_data_with: Any = None
    ) -> "Population | MeshPopulation":
        """Returns a population on the sweep's devices; the arguments are those of `Population`."""
        population: Any = Population if self.devices_per_run == 1 else MeshPopulation
        return population(config, task, dataset, self.devices, size, share_data_with)

    def trial_config(self, values: dict[str, Any]) -> Config:
        """The config of a trial, not resolved.

        Raises:
          UserError: its values are invalid, or contradict each other.
        """
        config = copy.deepcopy(self.config)
        for path, value in values.items():
            check_value(path, value, config)
            config_lib.assign(config, path, value)
        config_lib.check(config)
        optimizers.check(config.optimizer)
        return config


_Populations = dict[Any, tuple[Population | MeshPopulation, Dataset]]  # by signature, the newest last


@dataclasses.dataclass
class _Running:
    """A claimed trial, and the slots of its runs in the population once it trains."""

    trial: optuna.Trial
    config: Config
    slots: list[int] = dataclasses.field(default_factory=list)


class Worker:
    """One worker.

    Args:
      sweep: the settings of the sweep.
      study: its trials.
      signals: stop signals, polled between dispatches.
      tell: called after every epoch of a population, to update the display.
    """

    def __init__(self, sweep: Sweep, study: Study, signals: Signals, tell: Callable[[], None]):
        self._sweep, self._study, self._signals, self._tell = sweep, study, signals, tell
        self._capacity = max(1, sweep.size // sweep.seeds)  # trials that train together
        self._queues: dict[Any, list[_Running]] = {}
        self._running: list[_Running] = []
        self._loaded: dict[str, tuple[Dataset, _Populations]] = {}  # the newest last
        self._compilations = 0
        self._failures: list[str] = []

    def run(self) -> None:
        """Trains until no planned trial is left. After an error the trials that were running are planned again.

        Raises:
          StoppedError: a stop signal was received.
          UserError: ten trials in a row failed (while others train: 10 + twice the number that train together).
          OutOfMemoryError: a device ran out of memory.
        """
        try:
            while self._claim_a_few():
                signature = max(self._queues, key=lambda s: len(self._queues[s]))
                self._train(signature)
        except BaseException as error:
            reason = str(error) if isinstance(error, StoppedError) else "its worker failed"
            for running in [*self._running, *(r for queue in self._queues.values() for r in queue)]:
                self._study.retry(running.trial, reason)
            half = max(self._sweep.seeds, self._sweep.size // 2)
            advice = f"give --population={half} to continue, or search smaller networks"
            if self._sweep.devices_per_run > 1:
                advice = "search smaller networks, or start a sweep whose mesh has more devices"
            if exhausted := as_out_of_memory_error(error, advice):
                raise exhausted from None
            raise

    def _claim_a_few(self) -> bool:
        """Claims trials until they fill a population or none is left; returns whether any wait."""
        while sum(map(len, self._queues.values())) < self._capacity and self._claim():
            pass
        return any(self._queues.values())

    def _claim(self) -> bool:
        """Claims one trial and queues it with those of its signature; returns False if none is left."""
        self._study.retry_lost()
        trial = self._study.claim(self._sweep.trials)
        if trial is None:
            return False
        try:
            values = self._sweep.space.suggest(trial)
            config = self._sweep.trial_config(values)
            if self._sweep.space.function:  # its fields need not be what Optuna suggested
                trial.set_user_attr(FIELDS, values)
        except UserError as error:
            self._fail(trial, str(error))
        else:
            self._queues.setdefault(hyperparams.signature(config), []).append(_Running(trial, config))
        return True

    def _population(self, signature: Any, config: Config) -> tuple[Population | MeshPopulation, Dataset]:
        """The population of a signature, and its data set as the experiment prepares it."""
        key = repr(config.dataset)
        if key in self._loaded:
            dataset, populations = self._loaded.pop(key)
        else:
            _keep_newest(self._loaded, _MAX_DATASETS - 1)
            dataset, populations = load(self._sweep.experiment, config.dataset), {}
        self._loaded[key] = dataset, populations
        if signature not in populations:
            _keep_newest(populations, _MAX_POPULATIONS - 1)
            experiment, sweep = self._sweep.experiment, self._sweep
            dataset = experiment.prepare(config, dataset)
            config = experiment.resolve(config, dataset)
            task = experiment.build_task(config, dataset)
            size = self._capacity * sweep.seeds
            share_data_with = next((population for population, _ in populations.values()), None)
            populations[signature] = sweep.population(config, task, dataset, size, share_data_with), dataset
        populations[signature] = populations.pop(signature)  # the newest last
        return populations[signature]

    def _train(self, signature: Any) -> None:
        """Trains the trials of one signature, and those of the same signature that are claimed meanwhile."""
        queue = self._queues[signature]
        try:
            population, dataset = self._population(signature, queue[0].config)
        except UserError as error:
            for running in self._queues.pop(signature):
                self._fail(running.trial, str(error))
            return
        earlier = self._compilations - population.num_compilations
        while self._fill(population, dataset, signature):
            with self._signals.deferred():
                reports = population.train_epoch(lambda: bool(self._signals.received))
            if self._signals.received:
                name = self._signals.received.name
                raise StoppedError(f"stopped by {name}: the same command resumes", self._signals.received)
            self._compilations = earlier + population.num_compilations
            self._study.add_compilations(self._compilations)
            for running in list(self._running):
                if self._ended(running, [reports[slot] for slot in running.slots]):
                    self._running.remove(running)
                    for slot in running.slots:
                        population.stop(slot)
            self._tell()
            self._stop_if_all_fail()
        del self._queues[signature]

    def _fill(self, population: Population | MeshPopulation, dataset: Dataset, signature: Any) -> bool:
        """Starts waiting trials in free slots; returns whether any trial trains."""
        queue = self._queues[signature]
        while len(self._running) < self._capacity:
            others = sum(map(len, self._queues.values())) - len(queue)
            if not queue and (others >= self._capacity or not self._claim()):
                break
            if queue:
                running = queue.pop(0)
                self._running.append(running)
                running.slots = population.free[: self._sweep.seeds]
                config = self._sweep.experiment.resolve(running.config, dataset)
                for number, slot in enumerate(running.slots):
                    population.start(slot, dataclasses.replace(config, seed=config.seed + number))
        return bool(self._running)

    def _ended(self, running: _Running, reports: list[Report]) -> bool:
        """Records a trial's results of one epoch; returns whether the trial has ended."""
        trial, metric = running.trial, self._sweep.metric
        diverged = [report.diverged_at for report in reports if report.diverged_at is not None]
        if diverged:
            reason = f"{_DIVERGED} at step {min(diverged)}"
            self._failures.append(reason)
            attributes = {DIVERGED_AT: min(diverged), REASON: reason}
            self._study.finish(trial, None, TrialState.PRUNED, **attributes)
            return True
        values = [report.metrics[metric] for report in reports]
        value = sum(values) / len(values)
        try:
            trial.report(value, reports[0].epoch)
            pruned = not reports[0].finished and trial.should_prune()
        except optuna.exceptions.UpdateFinishedTrialError:  # another worker took it for lost
            return True
        if not (pruned or reports[0].finished):
            return False
        self._failures.clear()
        attributes = {FIGURES: [report.metrics for report in reports], SEED_VALUES: values}
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        self._study.finish(trial, None if pruned else value, state, **attributes)
        return True

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        self._failures.append(reason)
        self._study.finish(trial, None, TrialState.FAIL, **{REASON: reason})
        self._tell()
        self._stop_if_all_fail()

    def _stop_if_all_fail(self) -> None:
        # Trials that still train may succeed. But if trials fail within an epoch or two, some always train: hence
        # a higher limit then, not none.
        if len(self._failures) < (2 * self._capacity if self._running else 0) + _FAILURES_IN_A_ROW:
            return
        diverged = [reason for reason in self._failures if reason.startswith(_DIVERGED)]
        ((common, count),) = Counter(self._failures).most_common(1)
        if len(diverged) >= count:
            raise NonFiniteLossError(
                f"{len(self._failures)} trials in a row failed; in {len(diverged)} of them {_DIVERGED} "
                f"(the last: {diverged[-1].rpartition('at ')[2]}): search lower learning rates, or set "
                "--config.optimizer.clip_norm=1"
            )
        raise UserError(f"{len(self._failures)} trials in a row failed, {count} of them with: {common}")


def _keep_newest(kept: dict[Any, Any], count: int) -> None:
    for key in list(kept)[: max(0, len(kept) - count)]:
        del kept[key]


def fields(trial: FrozenTrial) -> dict[str, Any]:
    """The config fields that a trial sets: those that Optuna suggested, or those that a Python file returned."""
    return trial.user_attrs.get(FIELDS, trial.params)


def load(experiment: Experiment, config: DatasetConfig) -> Dataset:
    """Loads the data set of a trial.

    Raises:
      UserError: it is not available, or has no validation split.
    """
    dataset = experiment.load_data(config)
    if dataset.validation is None:
        raise UserError("a sweep ranks trials on a validation split: give --config.dataset.validation_fraction=0.1")
    return dataset
