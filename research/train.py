"""The one loop: trains, evaluates after every epoch, and leaves the record."""

import itertools
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import optimizers
from research.config import Config
from research.data.pipeline import EvalBatches, TrainBatches, epoch_ends, is_resident
from research.data.sources import Dataset
from research.errors import NonFiniteLossError
from research.state import TrainState, create_state, num_params
from research.steps import Steps
from research.tasks import Task
from research.writer import Writer

_SECONDS_PER_DISPATCH = 0.5
_MOST_STEPS_PER_DISPATCH = {True: 512, False: 8}  # by whether the data set is resident: streamed batches take memory


class _Pace:
    """How many steps the next dispatch makes: as configured, or about half a second's worth."""

    def __init__(self, config: Config, *, resident: bool, steps_per_epoch: int):
        most = config.steps_per_dispatch or _MOST_STEPS_PER_DISPATCH[resident]
        self.capacity = min(most, steps_per_epoch)
        self._adapts = not config.steps_per_dispatch
        self.steps = 1 if self._adapts else self.capacity

    def measured(self, num_steps: int, seconds: float) -> None:
        if self._adapts:
            self.steps = max(1, min(self.capacity, int(_SECONDS_PER_DISPATCH * num_steps / seconds)))


class _Training:
    """One run: its state, its compiled steps, and what it has seen so far."""

    def __init__(self, config: Config, task: Task, dataset: Dataset, mesh: jax.sharding.Mesh):
        self._config = config
        self._splits = {"validation": dataset.validation, "test": dataset.test}
        num_examples = len(next(iter(dataset.train.values())))
        self.ends = epoch_ends(num_examples, config.batch_size, config.num_epochs)
        resident = is_resident(config, dataset.train, dataset.validation, dataset.test)
        longest = max(end - start for start, end in itertools.pairwise([0, *self.ends]))
        self._pace = _Pace(config, resident=resident, steps_per_epoch=longest)
        self._batches = TrainBatches(dataset.train, config, mesh, resident=resident, capacity=self._pace.capacity)
        self._evals = {
            name: EvalBatches(split, config, mesh, resident=resident)
            for name, split in self._splits.items()
            if split is not None
        }
        tx = optimizers.make_optimizer(config.optimizer, self.ends[-1])
        self._rates = optimizers.learning_rates(config.optimizer, self.ends[-1])
        ema_decay = config.optimizer.ema_decay
        graphdef, self.state = create_state(task.create_model, tx, seed=config.seed, with_ema=ema_decay > 0, mesh=mesh)
        self._compile(Steps(task, graphdef, tx, ema_decay, mesh))
        # On a CPU nothing is gained by running ahead of the devices, and several dispatches in flight over several
        # host devices can starve each other's threads in an all-reduce until the process aborts.
        self._overlap = mesh.devices.flat[0].platform != "cpu"
        self.step = 0
        self.train_seconds = 0.0

    def _compile(self, steps: Steps) -> None:
        start = time.monotonic()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        seed, count = np.uint32(self._config.seed), np.int32(1)
        inputs = self._batches.sample()
        self._train = steps.jit_train(self.state).lower(shapes, self._batches.data, inputs, count, seed).compile()
        jitted = steps.jit_eval(self.state)
        self._eval = {
            name: jitted.lower(shapes.eval_params, shapes.model_state, batches.data, next(iter(batches))).compile()
            for name, batches in self._evals.items()
        }
        self.compile_seconds = time.monotonic() - start

    def _dispatches(self, end: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Trains up to step `end`; yields (steps made, metrics of the newest [k]) as they come back."""
        pending: list[tuple[int, int, Any]] = []
        seed = np.uint32(self._config.seed)
        last = time.monotonic()
        while self.step < end or pending:
            if self.step < end:
                count = min(self._pace.steps, end - self.step)
                inputs = self._batches.take(count)
                self.state, metrics = self._train(self.state, self._batches.data, inputs, np.int32(count), seed)
                self.step += count
                pending.append((self.step, count, metrics))
                if self._overlap and len(pending) == 1 and self.step < end:
                    continue
            step, count, metrics = pending.pop(0)
            values = {name: x[:count] for name, x in jax.device_get(metrics).items()}
            now = time.monotonic()
            self._pace.measured(count, now - last)
            self.train_seconds += now - last
            yield step, values
            # What the devices did meanwhile counts; where they were idle, this pause is not training.
            last = now if pending else time.monotonic()

    def train_epoch(self, epoch: int, writer: Writer) -> dict[str, float]:
        """Trains to the end of `epoch` (from 0); returns the means of the metrics over its steps."""
        history: dict[str, list[np.ndarray]] = {}
        batch_size, seconds_before, first = self._config.batch_size, self.train_seconds, self.step
        for step, values in self._dispatches(self.ends[epoch]):
            for name, x in values.items():
                history.setdefault(name, []).append(x)
            self._record(step, epoch, values, writer)
            speed = (step - first) * batch_size / (self.train_seconds - seconds_before)
            writer.progress(step, float(values["loss"].mean()), speed)
        return {name: float(np.concatenate(xs).mean(dtype=np.float64)) for name, xs in history.items()}

    def _record(self, last_step: int, epoch: int, values: dict[str, np.ndarray], writer: Writer) -> None:
        """Writes the lines of the steps just made, up to the first whose loss is not finite."""
        first_step = last_step - len(values["loss"]) + 1
        for i, step in enumerate(range(first_step, last_step + 1)):
            self._check_finite("the training loss became", values["loss"][i], step)
            if step % self._config.log_every_steps == 0:
                line = {name: float(x[i]) for name, x in values.items()}
                writer.scalars(step, epoch + 1, line | {"learning_rate": float(self._rates[step - 1])})

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not np.isfinite(value):
            raise NonFiniteLossError(
                f"{what} {value} at step {step}: try a lower --config.optimizer.learning_rate, or "
                "--config.optimizer.clip_norm=1"
            )

    def evaluate(self) -> dict[str, float]:
        """The means of the metrics over each held-out split, as `<split>_<name>`."""
        results = {}
        for split, batches in self._evals.items():
            sums: dict[str, float] = {}
            for inputs in batches:
                part = self._eval[split](self.state.eval_params, self.state.model_state, batches.data, inputs)
                # Waited for, so that a streamed set is never on the devices as a whole.
                for name, value in jax.device_get(part).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
            count = sums.pop("count")
            results |= {f"{split}_{name}": value / count for name, value in sums.items()}
        for name, value in results.items():
            if name.endswith("_loss"):
                self._check_finite(f"{name} is", value, self.step)
        return results


def train_and_evaluate(
    experiment: str, config: Config, task: Task, dataset: Dataset, mesh: jax.sharding.Mesh, workdir: Path
) -> tuple[TrainState, dict[str, Any]]:
    """Trains `task` on `dataset` and leaves the record in `workdir`.

    Args:
      experiment: its name in the record.
      config: checked and resolved (`research.app` does both).
      task: what is learned.
      dataset: the examples.
      mesh: the devices.
      workdir: an existing folder.

    Returns:
      The final state, and what summary.json holds.

    Raises:
      NonFiniteLossError: the loss became NaN or infinite; the record up to that step stays.
      UserError: the batch size is larger than the training set.
    """
    start = time.monotonic()
    training = _Training(config, task, dataset, mesh)
    writer = Writer(workdir, training.ends[-1], active=jax.process_index() == 0)
    with writer:
        writer.config(config)
        writer.message(f"{num_params(training.state):,} parameters; compiled in {training.compile_seconds:.1f} s")
        results: dict[str, float] = {}
        for epoch in range(config.num_epochs):
            means = training.train_epoch(epoch, writer)
            results = {f"train_{name}": value for name, value in means.items()} | training.evaluate()
            writer.scalars(training.step, epoch + 1, results)
            writer.message(_epoch_line(epoch + 1, config.num_epochs, results))
        summary = {
            "experiment": experiment,
            "dataset": dataset.name,
            "num_train_steps": training.step,
            "num_epochs": config.num_epochs,
            "global_batch_size": config.batch_size,
            **results,
            "examples_per_second": training.step * config.batch_size / training.train_seconds,
            "compile_seconds": training.compile_seconds,
            "train_seconds": training.train_seconds,
            "wall_seconds": time.monotonic() - start,
            "platform": mesh.devices.flat[0].platform,
            "device_kind": mesh.devices.flat[0].device_kind,
            "device_count": mesh.size,
            "process_count": jax.process_count(),
            "num_params": num_params(training.state),
            **{f"{package}_version": version(package) for package in ("jax", "flax", "optax", "numpy")},
        }
        writer.summary(summary)
    return training.state, summary


def _epoch_line(epoch: int, num_epochs: int, results: dict[str, float]) -> str:
    shown = (f"{name} {value:.4f}" for name, value in results.items() if name.endswith(("_loss", "_accuracy")))
    return f"epoch {epoch}/{num_epochs}  " + "  ".join(shown)
