"""The interface between a task and the training loop: losses, metrics, exported functions and plots."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.data.batch import Batch
from research.sharding_rules import Rules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from research.data.sources import Dataset
    from research.tasks.predictor import Predictor

Metrics = dict[str, jax.Array]
Inputs = Mapping[str, jax.Array]  # of an exported function
Examples = Mapping[str, np.ndarray]  # values of `Task.per_example` and the examples' numbers, "index", [n] each


def join_examples(parts: list[dict[str, np.ndarray]]) -> Examples:
    """Joins the values of several dispatches, [k, b] each, without those of padding and damaged examples."""
    if not parts:
        return {}
    joined = {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}
    kept = joined.pop("weight") > 0
    return {name: values[kept] for name, values in joined.items()}


@dataclasses.dataclass(frozen=True)
class ExportedFunction:
    """A function of a trained network that `launch.export` compiles.

    Attributes:
      call: `call(network, inputs)` returns the outputs; both are dictionaries of arrays.
      inputs: shape and dtype by name. A shape is written as "b, 32, 32, 3", where b is any number of examples.
      preprocessing: describes what `call` does to the inputs before the network, so that callers do not repeat it.
      context: how many tokens of a sequence the network attends to; None: no such limit.
    """

    call: Callable[[Any, Inputs], dict[str, jax.Array]]
    inputs: Mapping[str, tuple[str, str]]
    preprocessing: str
    context: int | None = None


class Task:
    """Base class of tasks. A subclass overrides `evaluate` or `advance`; everything else has a default.

    Attributes:
      network: builds the network from its rngs.
      unit: what an example consists of, and how many, as in ("characters", 128). If more than one, the speed is also
        reported in these.
      parallel_over_time: whether several devices can share an example's time axis (the mesh axis `sequence`).
      per_device_gradients: whether each device may compute the losses and gradients of its part of the batch on its
        own, so that one all-reduce a step suffices. The network's class must declare it as well, and subclasses do not
        inherit it: `research.training.per_device` says what it promises and how that is checked.
      per_example: names of values of `evaluate` that an evaluation does not average but collects, for every example of
        the split, for `evaluation_plots` and `tables`.
      sharding_rules: those of the experiment, which sets them (`Experiment.build_task`).
    """

    network: Callable[[nnx.Rngs], nnx.Module]
    unit: tuple[str, int] = ("examples", 1)
    parallel_over_time: bool = False
    per_device_gradients: ClassVar[bool] = False
    per_example: ClassVar[tuple[str, ...]] = ()
    sharding_rules: Rules = MappingProxyType({})

    def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network with its initial parameters."""
        return self.network(rngs)

    def check_data(self, dataset: "Dataset") -> None:
        """Raises `UserError` if the task cannot learn from the data set."""
        del dataset

    @property
    def widths(self) -> Any:
        """Each parameter's width relative to the base width (`research.parametrization`); None: one rate for all."""
        return getattr(getattr(self, "network", None), "widths", None)

    @property
    def torch_names(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the network's arrays in PyTorch, by path, as in "blocks.0.conv1.kernel"; {}: unknown."""
        return getattr(getattr(self, "network", None), "torch_names", {})

    def evaluate(self, model: nnx.Module, batch: Batch, *, key: jax.Array, train: bool) -> Metrics:
        """Computes the metrics of each example, among them "loss".

        Args:
          model: the network.
          batch: the examples.
          key: the random key of this batch.
          train: whether this is training.

        Returns:
          Float32 [b] each. Training minimizes the mean of "loss" and reports the mean of each. In evaluation a value
          may also be [b, ...].
        """
        raise NotImplementedError

    def example_weights(self, batch: Batch) -> jax.Array:
        """Returns the weights of the examples in the means of an evaluation, float32 [b]; by default all are 1."""
        return jnp.ones(batch.index.shape, jnp.float32)

    def with_hparams(self, hparams: Mapping[str, Any]) -> "Task":
        """Returns this task with the hyperparameters of a step that it reads; keys are paths, values may be traced."""
        del hparams
        return self

    def initial_carry(self, batch_size: int) -> Any:
        """Returns the first carry of `advance`: a pytree of arrays [batch_size, ...]; empty for a stateless task."""
        del batch_size
        return {}

    def advance(
        self, model: nnx.Module, batch: Batch, carry: Any, *, key: jax.Array, train: bool
    ) -> tuple[Metrics, Any]:
        """Like `evaluate`, for stateful tasks: the carry of row i goes to row i of the next batch."""
        return self.evaluate(model, batch, key=key, train=train), carry

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """Computes the reported metrics from the means (NumPy) of what `evaluate` returned, over many examples."""
        return {name: float(value) for name, value in means.items()}

    def split_metrics(self, split: str, sums: Mapping[str, Any], weight: Any) -> dict[str, float]:
        """Computes a split's metrics, named `<split>_<name>`, from the sums of `Steps.eval_steps` over its batches."""
        means = {name: value / weight for name, value in sums.items()}
        return {f"{split}_{name}": value for name, value in self.summarize(means).items()}

    def final_metrics(self, predict: "Predictor", dataset: "Dataset") -> dict[str, float]:
        """Computes metrics too costly for every epoch; names begin with their split, as in "test_nll"."""
        del predict, dataset
        return {}

    def functions(self, model: nnx.Module, dataset: "Dataset") -> dict[str, ExportedFunction]:
        """Returns the functions that `launch.export` compiles, by name; empty: the task cannot be exported."""
        del model, dataset
        return {}

    def plots(self, predict: "Predictor", dataset: "Dataset") -> "dict[str, Callable[[], Figure]]":
        """Returns functions that draw the plots of the trained network, by file name without ".png"."""
        del predict, dataset
        return {}

    def evaluation_plots(self, examples: Examples, dataset: "Dataset") -> "dict[str, Callable[[], Figure]]":
        """As `plots`, from the values of `per_example` in the newest evaluation of the test split."""
        del examples, dataset
        return {}

    def tables(self, examples: Examples, dataset: "Dataset") -> dict[str, str]:
        """Returns the run's CSV files, by file name without ".csv"; the arguments are those of `evaluation_plots`."""
        del examples, dataset
        return {}
