"""One run: its state, its compiled steps, how far it is, and how it stops and goes on."""

import dataclasses
import functools
import itertools
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from research import optimizers, sharding
from research.config import Config
from research.data.pipeline import EvalBatches, TrainBatches, epoch_ends, is_resident
from research.data.sources import Dataset
from research.errors import NonFiniteLossError
from research.process import distributed
from research.process.signals import Signals, StoppedError
from research.record.writer import Writer
from research.tasks.predictor import Predictor
from research.tasks.task import Task
from research.training import batch_statistics, hyperparams, noise_scale
from research.training.checkpoint import Checkpoints, checksums_of
from research.training.dispatch import Pace
from research.training.progress import Progress, non_finite
from research.training.state import create_state, is_finite
from research.training.steps import Steps


class Training:
    """One run: its state, its compiled steps, and what it has seen so far.

    Args:
      config: checked and resolved.
      task: what is learned.
      dataset: the examples.
      mesh: the devices.

    Raises:
      UserError: the batch size is larger than the training set, or the mesh splits a time axis that is not there.
    """

    def __init__(self, config: Config, task: Task, dataset: Dataset, mesh: jax.sharding.Mesh):
        if not task.parallel_over_time:
            sharding.refuse_sequence(config.mesh, "what is learned")
        self._began = time.monotonic()
        self.config = config
        self.task = task
        self.mesh = mesh
        self.dataset = dataset
        splits = {"validation": dataset.validation, "test": dataset.test}
        num_examples = len(next(iter(dataset.train.values())))
        self.ends = epoch_ends(num_examples, config.batch_size, config.num_epochs)
        resident = is_resident(config, dataset.train, dataset.validation, dataset.test)
        longest = max(end - start for start, end in itertools.pairwise([0, *self.ends]))
        self._pace = Pace(config, resident=resident, steps_per_epoch=longest)
        self._resident = resident
        self._evals = {
            name: EvalBatches(split, config, mesh, resident=resident)
            for name, split in splits.items()
            if split is not None
        }
        self._given = hyperparams.inputs(config, self.ends[-1])
        self._learning_rate = optimizers.learning_rate(
            optimizers.scaled(config.optimizer, config.batch_size), self.ends[-1]
        )
        self._learning_rate(0)  # compiled now, not while training
        tx = hyperparams.make_optimizer(config, self._given, task.widths)
        self.graphdef, self.state = create_state(task, tx, config, mesh)
        self._steps = Steps(task, self.graphdef, config, mesh)
        # On a CPU nothing is gained by running ahead of the devices, and several dispatches in flight over several
        # host devices can starve each other's threads in an all-reduce until the process aborts.
        self._overlap = mesh.devices.flat[0].platform != "cpu"
        self.signals, self.progress = Signals(), Progress()
        self._calls = 0
        self._check_pending = True
        self._estimate = self._steps.jit_estimate(self.state)

    def restore(self, checkpoints: Checkpoints) -> bool:
        """Goes to the newest checkpoint; False: there is none."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        if checkpoints.exist:  # or the memory would have to hold this state beside the other
            jax.tree.map(lambda x: x.delete(), self.state)
        restored = checkpoints.restore(shapes)
        if restored:
            self.state, progress = restored
            self.progress = Progress(**progress)
            self._began -= self.progress.wall_seconds
        return bool(restored)

    def rewind(self, error: NonFiniteLossError, writer: Writer, checkpoints: Checkpoints) -> None:
        """Goes back to the newest checkpoint; the batches from there up to the failed step's are not taken again.

        Raises:
          NonFiniteLossError: `error`, where this has happened as often as it may.
        """
        rewinds, left_out, began = self.progress.rewinds + 1, self.progress.batches_left_out, self._began
        if rewinds > self.config.max_rewinds:
            raise error
        checkpoints.wait()
        self.restore(checkpoints)
        self._began = began
        progress = self.progress
        progress.rewinds, progress.batches_left_out = rewinds, left_out + error.step - progress.step
        self._batches.go_to(progress.step + progress.batches_left_out)
        writer.resume(progress.step, progress.row)
        writer.warning(
            f"{str(error).partition(':')[0]}: back at the checkpoint of step {progress.step}, leaving out "
            f"{error.step - progress.step} batches (rewind {rewinds} of {self.config.max_rewinds})"
        )

    @property
    def wall_seconds(self) -> float:
        """Since this began, and all that its earlier processes took up to the checkpoint."""
        return time.monotonic() - self._began

    def compile(self, *, train: bool) -> float:
        """Compiles the evaluation and, where asked, the train step; returns the seconds it took."""
        start = time.monotonic()
        if train:
            self._check_per_device()  # before anything is trained
            arrays = self.state, self._batches.data, self._batches.sample(), np.int32(1), self._given
            self.train_program = self._steps.jit_train(self.state).lower(*arrays).compile()
        jitted = self._steps.jit_eval(self.state)
        params, model_state = self.state.eval_params, self.state.eval_model_state
        self._eval = {
            name: jitted.lower(params, model_state, self._eval_carry(), batches.data, next(iter(batches))).compile()
            for name, batches in self._evals.items()
        }
        return time.monotonic() - start

    @functools.cached_property
    def _batches(self) -> TrainBatches:
        return TrainBatches(
            self.dataset.train,
            self.config,
            self.mesh,
            resident=self._resident,
            capacity=self._pace.capacity,
            start=self.progress.step + self.progress.batches_left_out,
            shuffle=self.dataset.shuffle,
        )

    def _check_per_device(self) -> None:
        if self._steps.num_replicas > 1:
            self._steps.check_per_device(self.state, self._batches.data, self._batches.inputs_of_step(0), self._given)

    def estimate_statistics(self) -> None:
        """Gives the averaged parameters batch statistics of their own, from the newest steps' batches."""
        progress, count = self.progress, np.int32(0)
        if self.state.ema_model_state is None or progress.statistics_step == progress.step:
            return
        end = progress.step + progress.batches_left_out
        for step in range(max(end - batch_statistics.NUM_STEPS, 0), end):
            inputs = self._batches.inputs_of_step(step)
            self.state, count = self._estimate(self.state, self._batches.data, inputs, count, self._given)
        progress.statistics_step = progress.step

    @property
    def steps_per_dispatch(self) -> int:
        """How many steps the next call of the compiled program makes."""
        return self._pace.steps

    def _eval_carry(self) -> Any:
        carry = self.task.initial_carry(self.config.examples_at_once)
        return jax.device_put(carry, sharding.batch_sharding(self.mesh, 0))

    def predictor(self) -> Predictor:
        """The network as evaluation has it now, for pictures and further figures."""
        size = self.config.examples_at_once
        return Predictor(self.graphdef, self.state.eval_params, self.state.eval_model_state, self.mesh, size)

    def dispatches(self, end: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Trains up to step `end`, or to where a signal came; yields (step, metrics of the newest [k]) as they come.

        When it ends, the state is that of the last step yielded.

        Raises:
          NonFiniteLossError: the loss or the gradient of a step was not finite, after the steps before were yielded.
        """
        pending: list[tuple[int, Any]] = []
        issued = self.progress.step
        last = time.monotonic()
        while (more := issued < end and not self._stops()) or pending:
            if more:
                count = min(self._pace.steps, end - issued)
                inputs = self._batches.take(count)
                arrays = self.state, self._batches.data, inputs, np.int32(count), self._given
                self.state, metrics = self.train_program(*arrays)
                issued += count
                pending.append((count, metrics))
                if self._overlap and len(pending) == 1 and issued < end:
                    continue
            count, metrics = pending.pop(0)
            values = {name: x[:count] for name, x in jax.device_get(metrics).items()}
            now = time.monotonic()
            self._pace.measured(count, now - last)
            self.progress.train_seconds += now - last
            values, error = self.progress.advance(values, self.config.max_skipped_steps)
            if len(values["loss"]):
                yield self.progress.step, values
            if error:
                raise error
            # What the devices did meanwhile counts; where they were idle, this pause is not training.
            last = now if pending else time.monotonic()

    def _stops(self) -> bool:
        """Whether the run is to stop before the next dispatch; several processes agree on which that is."""
        self._calls += 1
        if distributed.asked_to_stop(self._calls):
            self.signals.received = signal.SIGTERM
        return bool(self.signals.received)

    def train_epoch(self, writer: Writer, checkpoints: Checkpoints) -> dict[str, float]:
        """Trains to the end of the epoch; returns the means of the metrics over its steps.

        Raises:
          StoppedError: a signal came; a checkpoint holds what was done.
        """
        progress, end = self.progress, self.ends[self.progress.epoch]
        every = self.config.checkpoint_every_steps or end
        seconds_before, first = progress.train_seconds, progress.step
        while progress.step < end:
            for step, values in self.dispatches(min(end, (progress.step // every + 1) * every)):
                progress.add(values)
                self._record(values, writer)
                speed = (step - first) * self.config.batch_size / (progress.train_seconds - seconds_before)
                writer.progress(step, float(values["loss"].mean()), speed)
            if self.signals.received or progress.step < end:
                self._stop(writer, checkpoints) if self.signals.received else self.save(writer, checkpoints)
        return progress.means(end - [0, *self.ends][progress.epoch])

    def finish_epoch(self, means: dict[str, float], writer: Writer, checkpoints: Checkpoints) -> None:
        """Evaluates, records the epoch's results, and saves a checkpoint."""
        progress = self.progress
        results = {f"train_{name}": value for name, value in self.task.summarize(means).items()}
        progress.results = results | noise_scale.critical_batch_size(means) | self.evaluate()
        progress.epoch, progress.sums = progress.epoch + 1, {}
        writer.scalars(progress.step, progress.epoch, progress.results)
        loss = progress.results.get("validation_loss")
        if loss is not None:
            progress.best = min(progress.best or [loss, progress.step], [loss, progress.step])
        self.save(writer, checkpoints)
        if self.signals.received and progress.epoch < len(self.ends):
            self._stop(writer, checkpoints)

    def save(self, writer: Writer, checkpoints: Checkpoints) -> None:
        """Saves a checkpoint in the background.

        Raises:
          NonFiniteLossError: a parameter or statistic is NaN or infinite.
          ReplicaError: an array differs between devices that should hold the same.
          UserError: the devices' losses are not those of the whole batch, at the first checkpoint.
        """
        # First: every process reads the other checks' results from its own replicas, and all must come to the same.
        sums = checksums_of(self.state)
        if not is_finite((self.state.params, self.state.model_state, self.state.ema_model_state)):
            raise non_finite("a parameter became NaN or infinite", self.progress.step)
        if self._check_pending:
            # Once more, with trained parameters: initial zeros may hide a difference.
            self._check_per_device()
            self._check_pending = False
        progress = dataclasses.replace(self.progress, row=writer.sync(), wall_seconds=self.wall_seconds)
        checkpoints.save(self.state, sums, dataclasses.asdict(progress), progress.best[1] if progress.best else None)

    def _stop(self, writer: Writer, checkpoints: Checkpoints) -> None:
        number = self.signals.received
        assert number
        self.save(writer, checkpoints)
        checkpoints.wait()
        raise StoppedError(
            f"stopped by {number.name} at step {self.progress.step} with a checkpoint: the same --workdir resumes it",
            number,
        )

    def _record(self, values: dict[str, np.ndarray], writer: Writer) -> None:
        """Writes the lines of the steps just made."""
        updates = self.progress.updates_before(values)
        first_step = self.progress.step - len(updates) + 1
        for i, step in enumerate(range(first_step, self.progress.step + 1)):
            if step % self.config.log_every_steps == 0:
                line = {name: float(x[i]) for name, x in values.items()}
                line["learning_rate"] = self._learning_rate(int(updates[i]))
                writer.scalars(step, self.progress.epoch + 1, line)
        if count := int(values.get("skipped", np.zeros(1)).sum()):
            writer.warning(f"{count} of the steps {first_step} to {step} skipped: loss or gradient not finite")

    def evaluate(self) -> dict[str, float]:
        """The means of the metrics over each held-out split, as `<split>_<name>`."""
        self.estimate_statistics()
        results = {}
        for split, batches in self._evals.items():
            sums: dict[str, Any] = {}
            carry = self._eval_carry()
            for inputs in batches:
                arrays = self.state.eval_params, self.state.eval_model_state, carry, batches.data, inputs
                carry, part = self._eval[split](*arrays)
                # Waited for, so that a streamed set is never on the devices as a whole.
                for name, value in jax.device_get(part).items():
                    sums[name] = sums.get(name, 0.0) + value.sum(0, np.float64)
            results |= self.task.figures(split, sums)
        for name, value in results.items():
            if name.endswith("_loss") and not np.isfinite(value):
                raise non_finite(f"{name} is {value}", self.progress.step)
        return results
