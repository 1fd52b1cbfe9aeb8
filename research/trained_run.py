"""A trained run for Python and notebooks: its record, its network and its predictions."""

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from research import app
from research.data.batch import Batch
from research.data.sources import Dataset
from research.errors import UserError
from research.experiment import Experiment
from research.flags import Command
from research.network import merge_network
from research.record.workdir import read_json, read_metrics
from research.tasks.task import ExportedFunction
from research.training.run import Training

Arrays = dict[str, np.ndarray]


class TrainedRun:
    """A run as it was when it was trained or loaded. `research.train` and `research.load` return it.

    The network has the parameters that evaluation uses: the averaged ones if the run keeps an average
    (`config.optimizer.ema_decay`), else those of the last step.

    Attributes:
      experiment: of the run.
      workdir: the folder of its record.
      config: with all defaults filled in. To extend the run, change it and train again with it and `workdir`.
      step: the number of train steps after which the network has these parameters.
      metrics: the lines of metrics.jsonl, as for `pandas.DataFrame(run.metrics)`; each has "step" and "epoch".
      summary: the contents of summary.json; {} if the run has not finished.
      predictor: applies functions of the network to arrays, as in
        `run.predictor(lambda network, batch, key: network.features(batch["x"]), {"x": x})`.
    """

    def __init__(self, experiment: Experiment, command: Command, training: Training):
        self.experiment, self.workdir = experiment, command.workdir
        self.config: Any = copy.deepcopy(training.config)
        self.step = training.progress.step
        self.metrics: list[dict[str, Any]] = read_metrics(command.workdir)
        self.summary: dict[str, Any] = read_json(command.workdir / "summary.json") or {}
        self.predictor = training.predictor()
        # Not the training itself, or the devices would keep the optimizer's state and the data set.
        self._command, self._dataset, self._mesh, self._task = command, training.dataset, training.mesh, training.task
        self._arrays = training.graphdef, training.state.eval_params, training.state.eval_model_state

    def __repr__(self) -> str:
        results = self.summary if self.summary.get("num_train_steps") == self.step else {}
        shown = [f"{name}={results[name]:.4g}" for name in ("test_accuracy", "test_loss") if name in results]
        return f"<{', '.join([f'run of {self.experiment.name}', f'step {self.step:,}', *shown, str(self.workdir)])}>"

    @functools.cached_property
    def network(self) -> nnx.Module:
        """The trained network. It is a copy: `predict` does not see changes to it."""
        return merge_network(*self._arrays)

    @property
    def plots(self) -> dict[str, Path]:
        """The run's plots (PNG files), by name."""
        return {path.stem: path for path in sorted(self.workdir.glob("*.png"))}

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data set, with its splits `train`, `validation` and `test`. `research.load` does not load it before.

        Raises:
          UserError: it is not available, or is not that of the run.
        """
        return self._dataset if self._dataset.has_examples else app.load_for(self.experiment, self._command)[1]

    def predict(
        self, inputs: Any, function: str | None = None, *, batch_size: int | None = None
    ) -> np.ndarray | Arrays:
        """Computes a function of the task (`Task.functions`, which `launch.export` exports) for any number of examples.

        Args:
          inputs: the function's inputs, [n, ...] each, as they are in the data set: images are uint8 [n, h, w, c]. A
            dictionary of arrays, or the array itself if there is one input. An input "index" counts the examples from 0
            if it is not given.
          function: its name; None: the task's first. A classifier has "classify", which returns the logits of
            evaluation, float32 [n, classes].
          batch_size: examples computed at once; None: as in evaluation.

        Returns:
          NumPy arrays [n, ...] by name, or the array itself if there is one output.

        Raises:
          UserError: there is no such function, or the inputs have other names, shapes or types.
        """
        offered = self._functions
        if not offered:
            raise UserError(
                f"{type(self._task).__name__} does not define `functions`: use run.predictor or run.network instead"
            )
        name = next(iter(offered)) if function is None else function
        if name not in offered:
            raise UserError(f"function={function!r}: the functions of this task are {', '.join(map(repr, offered))}")
        declared, apply = offered[name]
        arrays = _checked(name, declared, inputs)
        count = len(next(iter(arrays.values())))
        size = self.config.examples_at_once if batch_size is None else batch_size
        if size < 1:
            raise UserError(f"batch_size={size}: must be at least 1")
        # To a power of two, so that few examples do not compile a program for every number of them.
        if (padding := min(size, 2 ** max(count - 1, 0).bit_length()) - count) > 0:
            arrays = {n: np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)]) for n, x in arrays.items()}
        with jax.set_mesh(self._mesh):
            outputs = self.predictor(apply, arrays, batch_size=size)
        outputs = {n: x[:count] for n, x in outputs.items()}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    @functools.cached_property
    def _functions(self) -> dict[str, tuple[ExportedFunction, Callable[..., Any]]]:
        """The task's functions, each with itself as a function for `predictor`, which compiles it once."""
        functions = self._task.functions(merge_network(*self._arrays), self._dataset)
        return {name: (function, functools.partial(_call, function)) for name, function in functions.items()}


def _call(function: ExportedFunction, network: nnx.Module, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    del key
    index = {"index": batch.index} if "index" in function.inputs else {}
    return function.call(network, index | batch.features)


def _checked(name: str, function: ExportedFunction, inputs: Any) -> Arrays:
    """Returns the inputs as arrays of the declared dtypes, and checks their names and shapes."""
    needed = {n: shape for n, (shape, _) in function.inputs.items() if n != "index"}
    if not isinstance(inputs, Mapping):
        if len(needed) != 1:
            raise UserError(f"{name} has the inputs {', '.join(needed)}: give a dictionary of arrays")
        inputs = {next(iter(needed)): inputs}
    if not inputs or not needed.keys() <= inputs.keys() <= function.inputs.keys():
        raise UserError(f"{name} has the inputs {', '.join(function.inputs)}, not {', '.join(inputs) or 'none'}")
    arrays = {n: _array(n, *function.inputs[n], value) for n, value in inputs.items()}
    counts = {n: len(x) for n, x in arrays.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"the inputs have different numbers of examples: {counts}")
    return arrays


def _array(name: str, shape: str, dtype: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    sizes = [size.strip() for size in shape.split(",") if size.strip()]
    if not sizes:
        raise UserError(f"{name} is a single number, which predict does not support: use run.predictor")
    # A size that is not a number may be any.
    fits = len(sizes) == array.ndim and all(s == str(n) or not s.isdecimal() for s, n in zip(sizes, array.shape))
    if not fits or not np.can_cast(array.dtype, np.dtype(dtype), "same_kind"):
        raise UserError(f"{name} must be {dtype} [{shape}] with any b, not {array.dtype} {list(array.shape)}")
    converted = array.astype(dtype, copy=False)
    if np.issubdtype(dtype, np.integer) and (converted != array).any():  # images of 16 bits, for example
        raise UserError(f"{name} must be {dtype}, and these values of {array.dtype} do not fit")
    return converted
