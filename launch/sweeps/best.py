"""The end of a sweep: runs the best trial's command, which evaluates the test split, and completes the record."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from launch.sweeps import report
from launch.sweeps.trials import Study, differing
from launch.sweeps.worker import Sweep, fields
from research import app
from research.errors import UserError
from research.process.signals import Signals
from research.record import drawing

_VALUE = "best_command_value"


def _read_summary(workdir: Path) -> dict[str, Any]:
    path = workdir / "sweep.json"
    return json.loads(path.read_bytes()) if path.exists() else {}


def check_folder(workdir: Path, study: str, identity: dict[str, Any]) -> None:
    """Raises `UserError` if the folder holds the record of another study, or of a study with other settings."""
    recorded = {"study": study, "identity": identity} | _read_summary(workdir)
    if recorded["study"] != study:
        raise UserError(
            f"--workdir={workdir} holds the record of the study {recorded['study']}: give another --workdir"
        )
    if found := differing(identity, recorded["identity"]):
        raise UserError(
            f"--workdir={workdir} holds the record of another sweep ({found} differs): give another --workdir, or the "
            "flags that it was started with"
        )


def is_recorded(workdir: Path, fit: str) -> bool:
    """Returns whether `finish` has completed, this fit included ("": no fit)."""
    found = _read_summary(workdir)
    return _VALUE in found and (not fit or found.get("fit", {}).get("by") == fit)


def finish(workdir: Path, command: Sequence[str], fit_by: str, sweep: Sweep, study: Study, signals: Signals) -> None:
    """Writes the record, then runs the best trial's command for each seed.

    Args:
      workdir: the sweep's folder.
      command: the experiment's module and its flags, without `--workdir`.
      fit_by: the size against which a power law is fitted; "" for no fit.
      sweep: the settings of the sweep.
      study: its trials.
      signals: stop signals.

    Raises:
      UserError: no trial completed.
      StoppedError: a stop signal was received; the current run has saved a checkpoint.
    """
    ranked = report.best(study, sweep)
    if not ranked:
        report.write(workdir, study, sweep, {})
        raise UserError(f"no trial completed; {workdir}/trials.csv has the reasons")
    first = ranked[0]
    commands = report.commands(command[0], list(command[1:]), sweep, fields(first))
    lines = [report.shell(command) for command in commands]
    extra: dict[str, Any] = {"best_command": "\n".join(lines)}
    report.write(workdir, study, sweep, extra)
    print("\n  ".join([f"best: {report.line(first, sweep.metric)}", *lines]), flush=True)
    extra |= _run(workdir, sweep, first, commands, signals)
    assert first.value is not None  # complete trials have one
    if not math.isclose(extra[_VALUE], first.value, rel_tol=1e-6):
        print(
            f"  {sweep.metric} of that command on this machine: {extra[_VALUE]:.4f}; the trial's differs because "
            "rounding on a CPU depends on the number of cores"
        )
    report.write_summary(workdir, study, sweep, extra)
    if fit_by:  # after the record is written, since the fit may fail
        extra["fit"] = _fit(fit_by, sweep, ranked, workdir)
        report.write_summary(workdir, study, sweep, extra)
    _print_summary(report.summary(study, sweep), workdir)


def _print_summary(found: dict[str, Any], workdir: Path) -> None:
    print(
        f"{found['num_trials']} trials ({found['num_pruned']} pruned, {found['num_failed']} failed), "
        f"{found['num_compilations']} compilations, {found['wall_seconds']:.1f} s, "
        f"{found['trials_per_minute']:.1f} trials a minute\n  record: {workdir}/sweep.html"
    )


def _run(
    workdir: Path, sweep: Sweep, best: FrozenTrial, commands: Sequence[Sequence[str]], signals: Signals
) -> dict[str, Any]:
    """Runs the commands; returns their test metrics (mean, standard deviation) and the mean of the sweep's metric."""
    runs = []
    for number, command in enumerate(commands):
        folder = workdir / (f"best-{best.number}" + (f"-seed{number}" if sweep.seeds > 1 else ""))
        flags = [*command[2:], f"--workdir={folder}", "--config.distributed.start=never"]
        runs.append(app.run(sweep.experiment, flags, signals, sweep.single_run_devices))
    test_metrics: dict[str, Any] = {}
    for name in runs[0]:
        if name.startswith("test_"):
            values = [run[name] for run in runs]
            test_metrics[name] = statistics.mean(values)
            if len(values) > 1:
                test_metrics[f"{name}_std"] = statistics.stdev(values)
    return test_metrics | {_VALUE: statistics.mean(run[sweep.metric] for run in runs)}


def _fit(by: str, sweep: Sweep, ranked: Sequence[FrozenTrial], workdir: Path) -> dict[str, Any]:
    """Fits the power law to the best trials, plots it as fit.png and prints it."""
    from launch.sweeps import fit
    from research import plots

    points = fit.measurements(by, sweep, ranked)
    found = fit.fitted(by, "error" if sweep.maximizes else sweep.metric, points)
    drawing.save(workdir / "fit.png", lambda: plots.scaling_law(found))
    print(fit.lines(found), flush=True)
    return found
