"""Lowers an experiment's train step for devices that need not exist on this machine."""

import copy
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from launch.plans import known_datasets
from research import app, sharding
from research.config import Config, MeshConfig
from research.data.batch import Batch
from research.data.pipeline import batch_bytes, epoch_ends, is_resident, longest_epoch
from research.data.sources import Dataset
from research.data.streamed import StreamedSplit
from research.experiment import Experiment
from research.process import jax_settings
from research.tasks.task import Task
from research.training import hyperparams
from research.training.dispatch import dispatch_capacity
from research.training.state import TrainState, abstract_state
from research.training.steps import Steps


@dataclasses.dataclass(frozen=True)
class Workload:
    """An experiment to plan.

    Attributes:
      config: the resolved config.
      dataset: the data set, prepared by the experiment.
      task: the training task.
    """

    config: Any
    dataset: Dataset
    task: Task

    @property
    def num_examples(self) -> int:
        return self.dataset.num_examples

    @functools.cached_property
    def num_train_steps(self) -> int:
        """Steps of the whole training, with the batch size of `config`."""
        return epoch_ends(self.num_examples, self.config)[-1]

    @property
    def decodes_images(self) -> bool:
        """Whether hosts decode each image when it is needed."""
        return isinstance(self.dataset.train, StreamedSplit) and "image" in self.dataset.train

    @property
    def resident(self) -> bool:
        return is_resident(self.config, self.dataset.train, self.dataset.validation, self.dataset.test)

    @property
    def evaluation_bytes(self) -> int:
        """Bytes of the held-out splits on each device, which holds them if the data set is resident."""
        splits = (self.dataset.validation, self.dataset.test) if self.resident else ()
        return sum(array.nbytes for split in splits if split for array in split.values())


def load(experiment: Experiment, config: Config, mesh: MeshConfig) -> Workload:
    """Loads the experiment's data set, or blank images in place of a known one, and builds its task.

    Args:
      experiment: the experiment.
      config: its config.
      mesh: replaces the config's mesh; without -1.

    Raises:
      UserError: the data set is not available, or the config contradicts it or itself.
    """
    jax_settings.pin()
    config = copy.deepcopy(config)
    config.mesh = mesh
    return Workload(*app.load(known_datasets.add_missing(experiment, config.dataset), config))


def lower(workload: Workload, config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, TrainState]:
    """Lowers the train step on a mesh; returns it and the shapes and shardings of its state.

    Args:
      workload: the experiment.
      config: the workload's config, with the batch and mesh sizes of this plan.
      mesh: a mesh over devices of any kind.
    """
    hparams = hyperparams.traced(config, workload.num_train_steps)
    graphdef, _, state = abstract_state(
        workload.task, hyperparams.make_optimizer(config, hparams, workload.task.widths), config, mesh
    )
    steps = Steps(workload.task, graphdef, config, mesh)
    longest = longest_epoch(epoch_ends(workload.num_examples, config))
    streamed_bytes = 0 if workload.resident else batch_bytes(config, workload.dataset.train)
    size = config.examples_at_once
    capacity = dispatch_capacity(config, streamed_bytes=streamed_bytes, longest_epoch=longest)
    shape = capacity, config.batch_size // size, size

    def struct(dims: tuple[int, ...], dtype: Any, placement: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=placement)

    replicated, sharded = sharding.replicated(mesh), sharding.batch_sharding(mesh, 2)
    arrays = workload.dataset.train
    resident = {n: struct(x.shape, x.dtype, replicated) for n, x in arrays.items() if workload.resident}
    streamed = {n: struct((*shape, *x.shape[1:]), x.dtype, sharded) for n, x in arrays.items() if not workload.resident}
    numbers = struct(shape, np.int32, sharded)
    batches = Batch(streamed, index=numbers, epoch=numbers)
    scalars = struct((), np.int32, replicated), jax.tree.map(lambda x: struct(x.shape, x.dtype, replicated), hparams)
    with jax.set_mesh(mesh):
        return steps.jit_train(state).lower(state, resident, batches, *scalars), state
