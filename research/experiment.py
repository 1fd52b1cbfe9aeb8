"""What an experiment's file defines: its configs, its task, and what its command can do."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research import optimizers
from research.config import Config
from research.data import sources
from research.process.signals import Signals
from research.tasks.predictor import Predictor
from research.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment's file defines.

    Attributes:
      name: as in `python -m experiments.<name>`, and the folder of its runs.
      doc: its docstring, which `--help` shows.
      presets: functions that make its configs, by name; the first is the default.
      make_task: builds the task from the resolved config and the data set, whatever the seed. It is pure.
      prepare: turns the data set into what the task learns from; may raise `UserError`.
      complete: the config with what it leaves open and other fields or the data set decide. It is pure; may raise
        `UserError`.
      sample: what `--mode=sample` does with a trained network, given the options, of type `sample_options`, and the
        workdir; may raise `UserError`.
      sample_options: a dataclass of `research.config.option` fields, each of them a flag.
      run: what the whole command does in the place of `app.run`; None: that. Sweeps refuse an experiment that has one.
    """

    name: str
    doc: str
    presets: Mapping[str, Callable[[], Config]]
    make_task: Callable[[Any, sources.Dataset], Task]
    prepare: Callable[[Any, sources.Dataset], sources.Dataset] = lambda _, dataset: dataset
    complete: Callable[[Any, sources.Dataset], Any] = lambda config, _: config
    sample: Callable[[Predictor, Any, sources.Dataset, Any, Path], None] | None = None
    sample_options: type | None = None
    run: Callable[["Experiment", Sequence[str], Signals], Any] | None = None

    @property
    def modes(self) -> dict[str, str]:
        """What `--mode` may be, and what that does."""
        modes = {"train": "train, or resume the run in --workdir", "eval": "evaluate its newest checkpoint"}
        return modes | ({"sample": "show samples of what it has learned"} if self.sample else {})

    def resolve(self, config: Any, dataset: sources.Dataset) -> Any:
        """A config in which nothing is left open, so that the record says what was run; `config` stays as it is.

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

    @property
    def default_config(self) -> Config:
        """The config of the first preset."""
        return next(iter(self.presets.values()))()
