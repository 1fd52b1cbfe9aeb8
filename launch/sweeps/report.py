"""A sweep's record (sweep.json, trials.csv, sweep.html), and its display while it runs."""

import csv
import io
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from launch.sweeps import page
from launch.sweeps.trials import DIVERGED_AT, LOST, REASON, RETRY_OF, Study
from launch.sweeps.worker import SEED_VALUES, Sweep, fields
from research.record import storage

_NUM_SHOWN = 5  # best trials in the table
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def commands(module: str, args: list[str], sweep: Sweep, params: dict[str, Any]) -> list[list[str]]:
    """The commands that train one trial as ordinary runs, one for each of its seeds, as arguments of Python.

    Args:
      module: the experiment's module.
      args: the experiment's flags, without --workdir.
      sweep: gives the validation split and the seeds.
      params: the config fields that the trial sets.
    """
    values = {"dataset.validation_fraction": sweep.config.dataset.validation_fraction, **params}
    flags = [f"--config.{path}={value}" for path, value in values.items()]
    first = params.get("seed", sweep.config.seed)
    seeds = [f"--config.seed={first + number}" for number in range(sweep.seeds)] if sweep.seeds > 1 else [None]
    return [["-m", module, *args, *flags, *filter(None, [seed])] for seed in seeds]


def best(study: Study, sweep: Sweep) -> list[FrozenTrial]:
    """The completed trials, best first."""
    return sorted(study.trials(TrialState.COMPLETE), key=lambda trial: trial.value or 0.0, reverse=sweep.maximizes)


def summary(study: Study, sweep: Sweep) -> dict[str, Any]:
    """The contents of sweep.json, from the trials so far."""
    trials, ranked = study.trials(*_ENDED), best(study, sweep)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL or DIVERGED_AT in trial.user_attrs]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial not in failed]
    seconds = _busy_seconds(study)
    first = ranked[0] if ranked else None
    return {
        "study": study.optuna.study_name,
        "identity": study.identity,
        "metric": sweep.metric,
        "num_trials": len(trials),
        "num_complete": len(ranked),
        "num_pruned": len(pruned),
        "num_failed": len(failed),
        "best_trial": first and first.number,
        "best_value": first and first.value,
        "best_seed_values": first and first.user_attrs[SEED_VALUES],
        "best_params": first and fields(first),
        "num_compilations": study.num_compilations(),
        "wall_seconds": seconds,
        "trials_per_minute": 60 * len(trials) / seconds if seconds else 0.0,
    }


def _busy_seconds(study: Study) -> float:
    """Seconds in which at least one trial was running: pauses between a stop and a resume do not count."""
    now = datetime.now()
    times = []
    for trial in study.attempts():
        end = trial.datetime_complete or now
        if str(trial.user_attrs.get(REASON)).startswith(LOST) and (seen := study.last_seen(trial)):
            end = min(end, datetime.fromtimestamp(seen))  # the loss may have been noticed much later
        if trial.datetime_start:
            times.append((trial.datetime_start, max(end, trial.datetime_start)))
    total, until = 0.0, None
    for start, end in sorted(times):
        begin = max(start, until) if until else start
        total += max((end - begin).total_seconds(), 0.0)
        until = max(end, until) if until else end
    return total


def write(workdir: Path, study: Study, sweep: Sweep, extra: dict[str, Any]) -> None:
    """Writes the record; `extra` is added to sweep.json, and its "best_command" is shown in sweep.html.

    Raises:
      RecordError: it could not be written.
    """
    storage.replace(workdir / "trials.csv", _csv(study).encode())
    html = page.render(study, sweep, summary(study, sweep), best(study, sweep), extra.get("best_command", ""))
    storage.replace(workdir / "sweep.html", html.encode())
    write_summary(workdir, study, sweep, extra)


def write_summary(workdir: Path, study: Study, sweep: Sweep, extra: dict[str, Any]) -> None:
    """Writes sweep.json only."""
    storage.replace(workdir / "sweep.json", (json.dumps(summary(study, sweep) | extra, indent=2) + "\n").encode())


def _csv(study: Study) -> str:
    trials = study.attempts()
    names = sorted({name for trial in trials for name in fields(trial)})
    attributes = [DIVERGED_AT, REASON, RETRY_OF]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", "value", "epochs", *names, SEED_VALUES, *attributes, "seconds"])
    for trial in trials:
        seconds = trial.duration.total_seconds() if trial.duration else None
        seeds = " ".join(map(str, trial.user_attrs.get(SEED_VALUES, [])))
        last = max(trial.intermediate_values, default=None)
        row = [trial.number, trial.state.name.lower(), trial.value, last, *map(fields(trial).get, names), seeds]
        writer.writerow([*row, *map(trial.user_attrs.get, attributes), seconds])
    return text.getvalue()


def line(trial: FrozenTrial, metric: str) -> str:
    """Formats an ended trial as one line."""
    outcome = {
        TrialState.COMPLETE: f"{metric} {trial.value:.4f}" if trial.value is not None else "",
        TrialState.PRUNED: f"pruned after epoch {max(trial.intermediate_values, default=0)}",
    }.get(trial.state, "failed")
    reason = trial.user_attrs.get(REASON)
    return f"trial {trial.number}  {outcome if not reason else f'failed: {reason}'}  {_values(trial)}".rstrip()


def _values(trial: FrozenTrial) -> str:
    return " ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in fields(trial).items())


class Display:
    """Shows a running sweep: a table of the best trials on a terminal, else one line for each trial that ends."""

    def __init__(self, study: Study, sweep: Sweep):
        self._study, self._sweep = study, sweep
        self._seen = {trial.number for trial in study.attempts(*_ENDED)}
        self._live: Any = None

    @contextmanager
    def shown(self) -> Iterator["Display"]:
        """A context in which `update` displays."""
        if not sys.stdout.isatty():
            yield self
            return
        from rich.live import Live

        with Live(self._table(), auto_refresh=False) as self._live:
            yield self
        self._live = None

    def update(self) -> None:
        """Shows the trials that ended since the last call."""
        new = [trial for trial in self._study.attempts(*_ENDED) if trial.number not in self._seen]
        self._seen |= {trial.number for trial in new}
        if self._live:
            self._live.update(self._table(), refresh=True)
            return
        for trial in new:
            print(line(trial, self._sweep.metric), flush=True)

    def _table(self) -> Any:
        from rich.table import Table

        count = len(self._study.trials(*_ENDED))
        table = Table(title=f"{self._study.optuna.study_name}: {count} of {self._sweep.trials} trials")
        for heading in ("trial", self._sweep.metric, "values"):
            table.add_column(heading)
        for trial in best(self._study, self._sweep)[:_NUM_SHOWN]:
            table.add_row(str(trial.number), f"{trial.value:.4f}", _values(trial))
        return table


def shell(arguments: list[str]) -> str:
    """A command line to copy into a shell."""
    return shlex.join(["python", *arguments])
