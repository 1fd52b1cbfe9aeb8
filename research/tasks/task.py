"""What the loop asks of a task: the base class of all of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
from flax import nnx

from research.data.pipeline import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from research.data.sources import Dataset
    from research.tasks.predictor import Predictor

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Function:
    """One thing that a trained network can be asked, as `launch.export` makes a program of it.

    Attributes:
      call: `call(network, inputs)` gives the outputs; both are arrays by name, and all outputs are arrays.
      inputs: shape and dtype by name. Shapes are written as in "b, 32, 32, 3"; b is any number of examples.
      preprocessing: what `call` does to the inputs before the network sees them, so that nobody does it twice.
    """

    call: Callable[[Any, Batch], dict[str, jax.Array]]
    inputs: Mapping[str, tuple[str, str]]
    preprocessing: str


class Task:
    """What is learned. A task overrides one of `evaluate` and `advance`; the rest has defaults.

    Attributes:
      network: builds the network from its rngs.
      unit: what an example consists of, and how many of them: speed is also reported in these where there is more than
        one, as in ("characters", 128).
      parallel_over_time: whether several devices can share an example's time axis (the mesh's `sequence`).
      per_device_gradients: whether a device may compute the losses and the gradient of its part of the batch by itself,
        so that one all-reduce a step is enough. The network's class declares it too, and a subclass for itself: see
        `research.training.per_device` for what it promises, and what happens where that is not true.
    """

    network: Callable[[nnx.Rngs], nnx.Module]
    unit: tuple[str, int] = ("examples", 1)
    parallel_over_time: bool = False
    per_device_gradients: ClassVar[bool] = False

    def create_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network with its initial parameters."""
        return self.network(rngs)

    @property
    def widths(self) -> Any:
        """How wide each parameter is beside its base width (`research.parametrization`); None: all rates are alike."""
        return getattr(getattr(self, "network", None), "widths", None)

    def evaluate(self, model: nnx.Module, batch: Batch, *, key: jax.Array, train: bool) -> Metrics:
        """The values of every example.

        Args:
          model: the network.
          batch: the examples, [b, ...] each; "index" int32 [b], their numbers; in training also "epoch" int32 [b] and
            "step" int32 scalar, the updates made so far.
          key: for everything random, different for every batch.
          train: whether this is training.

        Returns:
          Float32 [b] each. Training minimises the mean of "loss", and reports the mean of each. In evaluation a value
          may also be [b, ...], and "weight" [b] weighs the examples' means.
        """
        raise NotImplementedError

    def with_inputs(self, inputs: Mapping[str, Any]) -> "Task":
        """This task with the inputs of the step (`hyperparams.py`) that it reads; in the step they are traced."""
        del inputs
        return self

    def initial_carry(self, batch_size: int) -> Any:
        """What `advance` is given first: a tree of arrays [batch_size, ...]; empty for a task without memory."""
        del batch_size
        return {}

    def advance(
        self, model: nnx.Module, batch: Batch, carry: Any, *, key: jax.Array, train: bool
    ) -> tuple[Metrics, Any]:
        """As `evaluate`, for a task whose batches continue each other: row i of a batch gets what row i left."""
        return self.evaluate(model, batch, key=key, train=train), carry

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """The figures that the record shows, from the means (NumPy) of what `evaluate` returned over many examples."""
        return {name: float(value) for name, value in means.items()}

    def figures(self, split: str, sums: Mapping[str, Any]) -> dict[str, float]:
        """`summarize` of a split, as `<split>_<name>`, from the sums of `Steps.eval_steps` over all its batches."""
        means = {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
        return {f"{split}_{name}": value for name, value in self.summarize(means).items()}

    def final_metrics(self, predict: "Predictor", dataset: "Dataset") -> dict[str, float]:
        """Figures that are too costly to have after every epoch; names begin with their split, as in "test_nll"."""
        del predict, dataset
        return {}

    def functions(self, model: nnx.Module, dataset: "Dataset") -> dict[str, Function]:
        """What `launch.export` makes of the network, by name; empty: it cannot be exported."""
        del model, dataset
        return {}

    def pictures(self, predict: "Predictor", dataset: "Dataset") -> "dict[str, Callable[[], Figure]]":
        """What draws the pictures of what has been learned, by the names of their files without ".png"."""
        del predict, dataset
        return {}
