"""A run: its state, its compiled programs, and how far it is."""

import dataclasses
import functools
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from research import flops, optimizers, sharding
from research.config import Config
from research.data.pipeline import EvalBatches, TrainBatches, batch_bytes, epoch_ends, is_resident, longest_epoch
from research.data.sources import Dataset
from research.process import distributed
from research.process.signals import Signals
from research.tasks.predictor import Predictor
from research.tasks.task import Examples, Task, join_examples
from research.training import batch_statistics, early_stopping, hyperparams, initialization
from research.training.checkpoint import Checkpoints
from research.training.dispatch import DispatchSizer
from research.training.progress import Progress, non_finite
from research.training.state import create_state
from research.training.steps import Steps, add_sums


class Training:
    """One run: what is needed to train it, to evaluate it and to resume it. The record is `loop.Loop`'s.

    Args:
      config: resolved.
      task: what is learned.
      dataset: the examples.
      mesh: the devices.
      signals: stop signals, polled between dispatches; None: none come.
      abstract: whether the state has shapes and shardings only; then nothing can be trained or evaluated.

    Attributes:
      state: the newest train state.
      progress: how far the run is.
      epoch_end_steps: the number of steps made when each epoch ends; the last is the number of train steps.
      learning_rate: the schedule, from the number of updates made.

    Raises:
      UserError: the batch size is larger than the training set, or the mesh splits a time axis that the task does not
        have.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        dataset: Dataset,
        mesh: jax.sharding.Mesh,
        signals: Signals | None = None,
        abstract: bool = False,
    ):
        if not task.parallel_over_time:
            sharding.refuse_sequence(config.mesh, "this task")
        self._began = time.monotonic()
        self.config, self.task, self.dataset, self.mesh = config, task, dataset, mesh
        self.signals, self.progress = signals or Signals(), Progress.begin(config)
        self.epoch_end_steps = epoch_ends(dataset.num_examples, config)
        self._resident = is_resident(config, dataset.train, dataset.validation, dataset.test)
        streamed = 0 if self._resident else batch_bytes(config, dataset.train)
        longest = longest_epoch(self.epoch_end_steps)
        self._sizer = DispatchSizer(config, streamed_bytes=streamed, longest_epoch=longest)
        self._hparams = hyperparams.traced(config, self.epoch_end_steps[-1])
        scaled = optimizers.scaled(config.optimizer, config.batch_size)
        self.learning_rate = optimizers.learning_rate(scaled, self.epoch_end_steps[-1])
        self.learning_rate(0)  # compiled now, not while training
        tx = hyperparams.make_optimizer(config, self._hparams, task.widths)
        self.graphdef, self.state = create_state(task, tx, config, mesh, abstract)
        self._steps = Steps(task, self.graphdef, config, mesh)
        self._estimate = self._steps.jit_estimate(self.state)
        # On a CPU nothing is gained by running ahead of the devices, and several dispatches in flight over several
        # host devices can starve each other's threads in an all-reduce until the process aborts.
        self._overlap = mesh.devices.flat[0].platform != "cpu"
        self._stop_polls = 0
        self._replicate = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
        self._examples: tuple[int, dict[str, Examples]] = -1, {}

    @functools.cached_property
    def _train_batches(self) -> TrainBatches:
        options = {"resident": self._resident, "capacity": self._sizer.capacity, "shuffle": self.dataset.shuffle}
        return TrainBatches(self.dataset.train, self.config, self.mesh, start=self.progress.next_batch, **options)

    @functools.cached_property
    def _eval_batches(self) -> dict[str, EvalBatches]:
        return {
            name: EvalBatches(split, self.config, self.mesh, resident=self._resident)
            for name, split in self.dataset.splits.items()
            if name != "train"
        }

    @property
    def train_arguments(self) -> tuple[Any, ...]:
        """Arguments of the train steps: (state, data, batches [k, m, b, ...], num_steps, hparams)."""
        batches = self._train_batches
        return self.state, batches.data, batches.example(), np.int32(1), self._hparams

    @functools.cached_property
    def train_trace(self) -> jax.stages.Traced:
        """The traced train steps."""
        return self._steps.jit_train(self.state).trace(*self.train_arguments)

    @functools.cached_property
    def model_flops(self) -> dict[str, float]:
        """As `flops.model_flops`, of a train step over all devices."""
        return flops.model_flops(self.train_trace.jaxpr)

    @functools.cached_property
    def train_program(self) -> Any:
        """The compiled train steps."""
        return self.train_trace.lower().compile()

    @functools.cached_property
    def _eval_programs(self) -> dict[str, Any]:
        jitted = self._steps.jit_eval(self.state)
        params, model_state = self.state.eval_params, self.state.eval_model_state
        return {
            name: jitted.lower(params, model_state, self._eval_carry(), batches.data, batches.example()).compile()
            for name, batches in self._eval_batches.items()
        }

    def compile(self, *, train: bool) -> float:
        """Compiles the evaluation and, where asked, the train steps; returns the seconds it took.

        Raises:
          UserError: as `check_per_device`.
        """
        start = time.monotonic()
        if train:
            self.check_per_device()  # before anything is trained
            _ = self.train_program
        _ = self._eval_programs
        return time.monotonic() - start

    def check_per_device(self) -> None:
        """Raises `UserError` where `per_device_gradients` is declared, and wrong for the present parameters."""
        if self._steps.num_replicas > 1:
            batches = self._train_batches
            self._steps.check_per_device(self.state, batches.data, batches.batch(0), self._hparams)

    def restore(self, checkpoints: Checkpoints, step: int | None = None, *, with_carry: bool = True) -> bool:
        """Restores the newest checkpoint, or that of `step`; returns False if there is none.

        Without the carry, which only training needs, a checkpoint can be restored with any batch size.
        """
        with_carry = with_carry or self.state.ema_model_state is not None  # `estimate_statistics` reads the carry
        replaced = self.state if with_carry else dataclasses.replace(self.state, carry=None)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), replaced)
        if checkpoints.steps:  # or the memory would have to hold both states
            jax.tree.map(lambda x: x.delete(), replaced)
        restored = checkpoints.restore(shapes, step)
        if restored:
            state, progress = restored
            self.state = state if with_carry else dataclasses.replace(state, carry=self.state.carry)
            self.progress = Progress.restore(progress, self.config, self.epoch_end_steps)
            self._began -= self.progress.wall_seconds
        return bool(restored)

    def start_from_weights(self) -> str:
        """Starts from the weights of --config.init.path; returns a line that says so, or "" without them.

        Raises:
          UserError: as `initialization.load`.
        """
        if not self.config.init.path:
            return ""
        num_classes = len(self.dataset.label_names)
        arrays, line = initialization.load(self.config.init, self.state, self.task.torch_names, num_classes)
        self.state = initialization.apply(self.state, arrays)
        return line

    def rewind(self, checkpoints: Checkpoints, *, failed_step: int) -> None:
        """Goes to the newest checkpoint, but leaves out the batches from there to the one of `failed_step`."""
        rewinds, left_out, began = self.progress.rewinds, self.progress.batches_left_out, self._began
        self.restore(checkpoints)
        self._began = began  # the wall time since the checkpoint counts, too
        self.progress.rewinds = rewinds + 1
        self.progress.batches_left_out = left_out + failed_step - self.progress.step
        self._train_batches.seek(self.progress.next_batch)

    @property
    def stop_reason(self) -> str:
        """Why the run stops before its last step, or ""."""
        return early_stopping.reason(self.config, self.progress, self.epoch_end_steps)

    @property
    def wall_seconds(self) -> float:
        """Wall time of the run, earlier processes included."""
        return time.monotonic() - self._began

    @property
    def steps_per_dispatch(self) -> int:
        """How many steps the next dispatch makes."""
        return self._sizer.num_steps

    def dispatches(self, end: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Trains up to step `end`, or until a stop signal; yields (step, metrics of the newest steps [k]).

        On an accelerator one dispatch is in flight while the metrics of the one before are yielded. When it ends, the
        state is that of the last step yielded.

        Raises:
          NonFiniteLossError: the loss or the gradient of a step was not finite, after the steps before were yielded.
        """
        pending: list[tuple[int, Any]] = []
        issued = self.progress.step
        last = time.monotonic()
        while (more := issued < end and not self._is_stopping()) or pending:
            if more:
                count = min(self._sizer.num_steps, end - issued)
                batches = self._train_batches.take(count)
                arrays = self.state, self._train_batches.data, batches, np.int32(count), self._hparams
                self.state, metrics = self.train_program(*arrays)
                issued += count
                pending.append((count, metrics))
                if self._overlap and len(pending) == 1 and issued < end:
                    continue
            count, metrics = pending.pop(0)
            values = {name: x[:count] for name, x in jax.device_get(metrics).items()}
            now = time.monotonic()
            self._sizer.update(count, now - last)
            self.progress.train_seconds += now - last
            values, error = self.progress.advance(values, self.config.max_skipped_steps)
            if len(values["loss"]):
                yield self.progress.step, values
            if error:
                raise error
            # The time that the caller took counts where the devices were busy meanwhile; else it is not training.
            last = now if pending else time.monotonic()

    def _is_stopping(self) -> bool:
        """Returns whether the run must stop before the next dispatch; all processes agree on which dispatch that is."""
        self._stop_polls += 1
        if distributed.asked_to_stop(self._stop_polls):
            self.signals.received = signal.SIGTERM
        return bool(self.signals.received)

    @property
    def stale_statistics(self) -> bool:
        """True if the averaged parameters lack batch statistics of their own, as in a checkpoint within an epoch."""
        return self.state.ema_model_state is not None and self.progress.statistics_step != self.progress.step

    def estimate_statistics(self) -> None:
        """Estimates the batch statistics of the averaged parameters from the newest steps' batches."""
        if not self.stale_statistics:
            return
        newest = self._train_batches, self.progress.next_batch, self._hparams
        self.state = batch_statistics.estimate_from_newest(self._estimate, self.state, *newest)
        self.progress.statistics_step = self.progress.step

    def evaluate(self) -> dict[str, float]:
        """The means of the metrics over each held-out split, as `<split>_<name>`.

        Also keeps the values of each example, for `examples`.

        Raises:
          NonFiniteLossError: a loss is not finite.
        """
        self.estimate_statistics()
        results, examples = {}, {}
        for split, batches in self._eval_batches.items():
            total: Any = None
            parts = []
            carry = self._eval_carry()
            for batch in batches:
                arrays = self.state.eval_params, self.state.eval_model_state, carry, batches.data, batch
                carry, part, values = self._eval_programs[split](*arrays)
                # Waited for, so that a streamed set is never on the devices as a whole.
                total = add_sums(total, jax.device_get(part))
                if values:
                    parts.append(jax.device_get(self._replicate(values)))
            results |= self.task.split_metrics(split, *total)
            examples[split] = join_examples(parts)
        self._examples = self.progress.step, examples
        for name, value in results.items():
            if name.endswith("_loss") and not np.isfinite(value):
                raise non_finite(f"{name} is {value}", self.progress.step)
        return results

    def examples(self, split: str) -> Examples:
        """Returns the values of `Task.per_example` for the intact examples of a split, evaluated at this step."""
        if self.task.per_example and self._examples[0] != self.progress.step:
            self.evaluate()
        return self._examples[1].get(split, {})

    def _eval_carry(self) -> Any:
        carry = self.task.initial_carry(self.config.examples_at_once)
        return jax.device_put(carry, sharding.batch_sharding(self.mesh, 0))

    def predictor(self) -> Predictor:
        """The network that evaluation uses, for plots and final metrics."""
        arrays = self.state.eval_params, self.state.eval_model_state
        return Predictor(self.graphdef, *arrays, self.mesh, self.config.examples_at_once, self.task.sharding_rules)
