"""The train steps of an experiment, lowered for devices that need not be there."""

import copy
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from research import app, sharding
from research.config import Config, MeshConfig
from research.data.pipeline import epoch_ends, is_resident, longest_epoch
from research.data.sources import Dataset
from research.experiment import Experiment
from research.tasks.task import Task
from research.training import hyperparams
from research.training.dispatch import dispatch_capacity
from research.training.state import TrainState, abstract_state
from research.training.steps import Steps


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is planned.

    Attributes:
      config: resolved.
      dataset: as the experiment prepares it.
      task: what is learned.
    """

    config: Any
    dataset: Dataset
    task: Task

    @property
    def num_examples(self) -> int:
        return len(next(iter(self.dataset.train.values())))

    @functools.cached_property
    def num_train_steps(self) -> int:
        """Of the config as it was given."""
        return epoch_ends(self.num_examples, self.config.batch_size, self.config.num_epochs)[-1]

    @property
    def resident(self) -> bool:
        return is_resident(self.config, self.dataset.train, self.dataset.validation, self.dataset.test)

    @property
    def evaluation_bytes(self) -> int:
        """Of the held-out splits, where each device holds all data."""
        splits = (self.dataset.validation, self.dataset.test) if self.resident else ()
        return sum(array.nbytes for split in splits if split for array in split.values())


def load(experiment: Experiment, config: Config, mesh: MeshConfig) -> Workload:
    """Loads the experiment's data set and builds its task, for a mesh whose sizes are all known.

    Raises:
      UserError: there is no such data, or the config contradicts it or itself.
    """
    config = copy.deepcopy(config)
    config.mesh = mesh
    return Workload(*app.load(experiment, config))


def lower(workload: Workload, config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, TrainState]:
    """The program of the train steps on a mesh, not compiled yet, and the shapes of its state.

    Args:
      workload: the experiment.
      config: its own, with the batch and the mesh of this step.
      mesh: over devices of any kind.
    """
    given = hyperparams.inputs(config, workload.num_train_steps)
    graphdef, _, state = abstract_state(
        workload.task, hyperparams.make_optimizer(config, given, workload.task.widths), config, mesh
    )
    steps = Steps(workload.task, graphdef, config, mesh)
    longest = longest_epoch(epoch_ends(workload.num_examples, config.batch_size, config.num_epochs))
    size, capacity = (
        config.examples_at_once,
        dispatch_capacity(config, resident=workload.resident, longest_epoch=longest),
    )
    shape = capacity, config.batch_size // size, size

    def placed(dims: tuple[int, ...], dtype: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh, 2)
    arrays = workload.dataset.train
    resident = {n: placed(x.shape, x.dtype, whole) for n, x in arrays.items() if workload.resident}
    streamed = {n: placed((*shape, *x.shape[1:]), x.dtype, rows) for n, x in arrays.items() if not workload.resident}
    inputs = {name: placed(shape, np.int32, rows) for name in ("index", "epoch")} | streamed
    scalars = placed((), np.int32, whole), jax.tree.map(lambda x: placed(x.shape, x.dtype, whole), given)
    with jax.set_mesh(mesh):
        return steps.jit_train(state).lower(state, resident, inputs, *scalars), state
