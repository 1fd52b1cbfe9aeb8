"""The train loop: batch, step, metrics, evaluation, checkpoint, stop."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research import plots
from research.config import Config
from research.data.sources import Dataset
from research.errors import NonFiniteLossError
from research.process.signals import Signals, StoppedError
from research.record import data_json, drawing
from research.record.workdir import read_metrics
from research.record.writer import Writer
from research.tasks.task import Task
from research.training import early_stopping, noise_scale, summary, utilization
from research.training.callbacks import Callback, Callbacks
from research.training.checkpoint import Checkpoints, checksums_of
from research.training.pauses import Pauses
from research.training.progress import non_finite
from research.training.run import Training
from research.training.state import is_finite


class Loop:
    """Trains a run to its end, and records it.

    Args:
      experiment: its name in the record.
      run: at its first step, or where it resumes.
      writer: of the record.
      checkpoints: of the run.
      callbacks: called at chosen steps, after every epoch and at the end.
    """

    def __init__(
        self,
        experiment: str,
        run: Training,
        writer: Writer,
        checkpoints: Checkpoints,
        callbacks: Callbacks | None = None,
    ):
        self._experiment = experiment
        self._run = run
        self._writer = writer
        self._checkpoints = checkpoints
        self._check_pending = True
        self._peak_speed: float | None = None
        self._callbacks = callbacks or Callbacks([])
        self._pauses = Pauses(run.config, self._callbacks.every_steps, self._callbacks.at_steps)

    def train(self) -> None:
        """Trains from where the run is to the end of the last epoch, or until it stops early.

        Raises:
          NonFiniteLossError: the loss or the gradient became NaN or infinite, more often than the config allows.
          StoppedError: a stop signal came; a checkpoint has been saved.
        """
        run, every = self._run, self._run.config.plot_every_epochs
        self._peak_speed = utilization.peak_speed(run)
        self._pauses.restart(run.progress.step)  # where it resumes
        while not self._is_finished():
            if (epoch := run.progress.epoch) and every and epoch % every == 0:
                self.draw()
            try:
                self.train_epoch()
            except NonFiniteLossError as error:
                self._rewind(error)

    def _is_finished(self) -> bool:
        return self._run.progress.epoch >= len(self._run.epoch_end_steps) or bool(self._run.stop_reason)

    def train_epoch(self) -> None:
        """Trains, evaluates and saves one epoch, or what is left of it."""
        run, end = self._run, self._run.epoch_end_steps[self._run.progress.epoch]
        if run.progress.step in run.epoch_end_steps:
            run.progress.sums = {}
        seconds_before, first = run.progress.train_seconds, run.progress.step
        while run.progress.step < end and not run.progress.stopped:
            # Batch, step, metrics: several steps per dispatch.
            for step, metrics in run.dispatches(self._pauses.next(run.progress.step, end)):
                self._record(metrics)
                speed = (step - first) * run.config.batch_size / (run.progress.train_seconds - seconds_before)
                used = speed / self._peak_speed if self._peak_speed else None
                self._writer.progress(step, float(metrics["loss"].mean()), speed, used)
                self._callbacks.on_step(run, metrics)
            if run.progress.step < end and not run.progress.stopped:
                self.pause()
        # Evaluation, before the checkpoint and also where a stop signal came in the epoch's last dispatch: the
        # checkpoint at the end of an epoch holds its results, or resuming from it would never save them.
        self.finish_epoch()
        # Stop.
        if not self._is_finished():
            self._stop_if_asked()

    def pause(self) -> None:
        """Within an epoch, evaluates and saves a checkpoint if they are due; stops if a signal came."""
        step = self._run.progress.step
        # Evaluation before the checkpoint, which holds its results: resuming from it does not repeat the evaluation.
        is_best = self._pauses.evaluates(step) and self.evaluate()
        is_stopping = bool(self._run.signals.received)  # read once: a signal may come while saving, and after it
        if self._pauses.saves(step) or is_best or is_stopping:
            self.save()
        if is_stopping:
            self._stop_if_asked()

    def evaluate(self) -> bool:
        """Evaluates within an epoch and records the results; returns whether the validation loss is the lowest."""
        run, step = self._run, self._run.progress.step
        results = run.evaluate()
        self._writer.scalars(step, run.progress.epoch + 1, results)
        self._writer.message(summary.results_line(f"step {step:,}/{run.epoch_end_steps[-1]:,}", results))
        return run.progress.update_best(results)

    def finish_epoch(self) -> None:
        """Evaluates, records the epoch's results, and saves a checkpoint."""
        run, progress = self._run, self._run.progress
        means = progress.means()
        results = {f"train_{name}": value for name, value in run.task.summarize(means).items()}
        results |= noise_scale.critical_batch_size(means) | run.evaluate()
        progress.finish_epoch(results)
        self._writer.scalars(progress.step, progress.epoch, results)
        # Before the checkpoint, which holds the callbacks' state, and whether one of them stops the run.
        self._callbacks.on_epoch(run, results)
        self.save()
        self._writer.message(summary.results_line(f"epoch {progress.epoch}/{len(run.epoch_end_steps)}", results))

    def save(self) -> None:
        """Saves a checkpoint in the background.

        Raises:
          NonFiniteLossError: a parameter or statistic is NaN or infinite.
          ReplicaError: an array differs between devices that should hold the same.
          UserError: `per_device_gradients` is declared, and found wrong at the first checkpoint.
        """
        run, state = self._run, self._run.state
        # First: every process reads the other checks' results from its own replicas, and all must come to the same.
        sums = checksums_of(state)
        if not is_finite((state.params, state.model_state, state.ema_model_state)):
            raise non_finite("a parameter became NaN or infinite", run.progress.step)
        if self._check_pending:
            # Once more, with trained parameters: initial zeros may hide a difference.
            run.check_per_device()
            self._check_pending = False
        progress = dataclasses.replace(run.progress, row=self._writer.sync(), wall_seconds=run.wall_seconds)
        best_step = progress.best[1] if progress.best else None
        self._checkpoints.save(state, sums, dataclasses.asdict(progress), best_step)
        self._pauses.restart(run.progress.step)

    def _stop_if_asked(self) -> None:
        if number := self._run.signals.received:
            self._checkpoints.wait()
            raise StoppedError(
                f"stopped by {number.name} at step {self._run.progress.step} with a checkpoint: the same --workdir "
                "resumes it",
                number,
            )

    def _rewind(self, error: NonFiniteLossError) -> None:
        """Goes back to the newest checkpoint; raises `error` where this has happened as often as it may."""
        run, most = self._run, self._run.config.max_rewinds
        if run.progress.rewinds >= most:
            raise error
        self._checkpoints.wait()
        run.rewind(self._checkpoints, failed_step=error.step)
        progress = run.progress
        self._pauses.restart(progress.step)
        self._writer.resume(progress.step, progress.row)
        self._writer.warning(
            f"{str(error).partition(':')[0]}: back at the checkpoint of step {progress.step}, leaving out "
            f"{error.step - progress.step} batches (rewind {progress.rewinds} of {most})"
        )

    def _record(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics of the newest steps, [k] each, to the epoch's means and to metrics.jsonl."""
        progress = self._run.progress
        progress.add(metrics)
        updates = progress.updates_before(metrics)
        first_step = progress.step - len(updates) + 1
        for i, step in enumerate(range(first_step, progress.step + 1)):
            if step % self._run.config.log_every_steps == 0:
                line = {name: float(x[i]) for name, x in metrics.items()}
                line["learning_rate"] = self._run.learning_rate(int(updates[i]))
                self._writer.scalars(step, progress.epoch + 1, line)
        if count := int(metrics.get("skipped", np.zeros(1)).sum()):
            self._writer.warning(
                f"{count} of the steps {first_step} to {progress.step} skipped: loss or gradient not finite"
            )

    def draw(self) -> None:
        """Draws the curves so far, and the task's plots of what it has learned."""
        run, writer = self._run, self._writer
        step, row = run.progress.step, writer.sync()

        def curves() -> Any:
            return plots.curves({self._experiment: [*read_metrics(writer.workdir), *filter(None, [row])]})

        writer.plot("curves", curves, step)
        examples = run.examples("test")
        drawings = drawing.attempt(
            "no plots were drawn",
            lambda: run.task.plots(run.predictor(), run.dataset) | run.task.evaluation_plots(examples, run.dataset),
            writer.warning,
        )
        for name, draw in (drawings or {}).items():
            writer.plot(name, draw, step)
        for name, text in run.task.tables(examples, run.dataset).items():
            writer.table(name, text)


def train_and_evaluate(
    experiment: str,
    config: Config,
    task: Task,
    dataset: Dataset,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    signals: Signals | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[str] = (),
) -> tuple[Training, dict[str, Any]]:
    """Trains `task` on `dataset` and records it in `workdir`; resumes from its newest checkpoint if there is one.

    Args:
      experiment: its name in the record.
      config: resolved.
      task: what is learned.
      dataset: the examples.
      mesh: the devices.
      workdir: an existing folder.
      signals: stop signals, polled between dispatches.
      callbacks: of the experiment.
      trackers: names of the trackers that receive the record, too (`research/record/trackers.py`).

    Returns:
      The run with its final state, and the contents of summary.json.

    Raises:
      NonFiniteLossError: the loss or the gradient became NaN or infinite, more often than the config allows; the
        record up to that step stays.
      StoppedError: a stop signal came; a checkpoint has been saved.
      UserError: the batch size is larger than the training set, early stopping has no validation split, or the
        checkpoints cannot be restored.
    """
    early_stopping.check(config, dataset)
    run = Training(config, task, dataset, mesh, signals)
    options = {"active": jax.process_index() == 0, "experiment": experiment, "tracker_names": trackers}
    with (
        jax.set_mesh(mesh),
        contextlib.closing(Callbacks(callbacks)) as called,
        Writer(workdir, run.epoch_end_steps[-1], **options) as writer,
        Checkpoints(workdir, keep=config.keep_checkpoints, message=writer.warning) as checkpoints,
    ):
        loop = Loop(experiment, run, writer, checkpoints, called)
        resumes = run.restore(checkpoints)
        weights_line = "" if resumes else run.start_from_weights()
        called.on_start(run)
        compile_seconds = run.compile(train=True)
        if not resumes and (path := workdir / "metrics.jsonl").exists() and path.stat().st_size:
            writer.warning("metrics.jsonl has steps, but there is no checkpoint: training from the start")
        if jax.process_index() == 0:
            data_json.write(workdir, dataset)
        writer.config(config)
        writer.resume(run.progress.step, run.progress.row)
        for line in _first_lines(run, compile_seconds, weights_line, resumes):
            writer.message(line)
        if config.max_rewinds and not resumes:
            loop.save()  # the first checkpoint to go back to
        with run.signals.deferred():
            loop.train()
        checkpoints.wait()
        if run.stop_reason:
            writer.message(f"stopped at step {run.progress.step:,} by {run.stop_reason}")
        results = run.progress.results | task.final_metrics(run.predictor(), dataset)
        found = summary.make(experiment, run, results, compile_seconds)
        called.on_end(run, found)
        writer.summary(found)
        loop.draw()
    return run, found


def _first_lines(run: Training, compile_seconds: float, weights_line: str, resumes: bool) -> Iterator[str]:
    """The lines on the terminal before the first step; `weights_line` says what the network starts from, if given."""
    yield f"{summary.params_line(run.state)}; compiled in {compile_seconds:.1f} s"
    if weights_line:
        yield weights_line
    if run.mesh.size > 1:
        yield summary.memory_line(run.state)
    if resumes:
        yield f"resumed at step {run.progress.step:,} of {run.epoch_end_steps[-1]:,}"
