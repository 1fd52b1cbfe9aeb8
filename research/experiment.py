"""The definition of an experiment: its configs, its task, and what its command can do."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research import optimizers
from research.config import Config, DatasetConfig
from research.data import own_data, sources
from research.process.signals import Signals
from research.sharding_rules import Rules
from research.tasks.predictor import Predictor
from research.tasks.task import Task
from research.training.callbacks import Callback


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment: every file in `experiments/` defines one.

    Attributes:
      name: as in `python -m experiments.<name>`; also the name of the folder of its runs.
      doc: the docstring that `--help` shows.
      presets: functions that return a config, by name; the first is the default.
      make_task: builds the task from the resolved config and the data set, independently of the seed. It is pure, and
        reads the examples through `Dataset.statistic` only: sampling and export have no examples.
      datasets: functions that load the experiment's own data sets, by name (`research.data.own_data.load` describes
        what they return); --config.dataset.name chooses one of them, or one that every experiment has.
      prepare: turns the data set into what the task learns from; may raise `UserError`.
      complete: returns the config with the fields filled in that other fields or the data set decide. It is pure; may
        raise `UserError`.
      sample: implements `--mode=sample`; called with a predictor, the config, the data set (without examples), the
        options (of type `sample_options`) and the workdir; may raise `UserError`.
      sample_options: a dataclass of `research.config.option` fields, each of which is a flag.
      callbacks: makes a run's callbacks from the resolved config (`research/training/callbacks.py`). Sweeps refuse an
        experiment that has them.
      sharding_rules: how the mesh splits parameters, by regular expressions over their paths, or a function that makes
        the rules from the resolved config (`research/sharding_rules.py`).
      run: replaces `app.run` as the whole command; None: `app.run`. Sweeps and `research.train` refuse an experiment
        that has one.
    """

    name: str
    doc: str
    presets: Mapping[str, Callable[[], Config]]
    make_task: Callable[[Any, sources.Dataset], Task]
    datasets: Mapping[str, own_data.Load] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Any, sources.Dataset], sources.Dataset] = lambda _, dataset: dataset
    complete: Callable[[Any, sources.Dataset], Any] = lambda config, _: config
    sample: Callable[[Predictor, Any, sources.Dataset, Any, Path], None] | None = None
    sample_options: type | None = None
    callbacks: Callable[[Any], Sequence[Callback]] | None = None
    sharding_rules: Rules | Callable[[Any], Rules] = dataclasses.field(default_factory=dict)
    run: Callable[["Experiment", Sequence[str], Signals], Any] | None = None

    @property
    def modes(self) -> dict[str, str]:
        """The values of `--mode`, and what each does."""
        modes = {"train": "train, or resume the run in --workdir", "eval": "evaluate a checkpoint"}
        return modes | ({"sample": "draw samples from the trained network"} if self.sample else {})

    def load_data(self, config: DatasetConfig) -> sources.Dataset:
        """Loads the data set that the config names, one of the experiment's own or another.

        Raises:
          UserError: as `sources.load`.
        """
        return sources.load(config, self.datasets)

    def resolve(self, config: Any, dataset: sources.Dataset) -> Any:
        """Returns the config with all defaults filled in, so that the record says what was run; pure.

        Args:
          config: checked.
          dataset: as `prepare` returns it.

        Raises:
          UserError: fields contradict each other or the data set.
        """
        resolved = copy.deepcopy(config)
        resolved.dataset.name = dataset.name
        resolved.optimizer = optimizers.resolve(resolved.optimizer)
        return self.complete(resolved, dataset)

    def build_task(self, config: Any, dataset: sources.Dataset) -> Task:
        """Calls `make_task`, gives the task the sharding rules, and checks the data set.

        Raises:
          UserError: the task cannot learn from the data set.
        """
        task = copy.copy(self.make_task(config, dataset))
        rules = self.sharding_rules(config) if callable(self.sharding_rules) else self.sharding_rules
        object.__setattr__(task, "sharding_rules", rules)  # a task may be a frozen dataclass
        task.check_data(dataset)
        return task

    @property
    def default_config(self) -> Config:
        """The config of the first preset."""
        return next(iter(self.presets.values()))()
