"""The end of a sweep: the best trial's command is run, which says what the test split has, and the record completed."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from launch.sweeps import report as report
from launch.sweeps.study import Study, differing
from launch.sweeps.worker import Sweep, fields
from research import app
from research.errors import UserError
from research.process.signals import Signals

_VALUE = "best_command_value"


def _recorded(workdir: Path) -> dict[str, Any]:
    path = workdir / "sweep.json"
    return json.loads(path.read_text()) if path.exists() else {}


def check_folder(workdir: Path, study: str, identity: dict[str, Any]) -> None:
    """Raises `UserError` where the folder has the record of another study, or of one of its name in another storage."""
    recorded = {"study": study, "identity": identity} | _recorded(workdir)
    if recorded["study"] != study:
        raise UserError(f"--workdir={workdir} has the record of the study {recorded['study']}: give another --workdir")
    if found := differing(identity, recorded["identity"]):
        raise UserError(
            f"--workdir={workdir} has the record of another sweep ({found} differs): give another --workdir, or the "
            "flags that it was begun with"
        )


def is_recorded(workdir: Path, fit: str) -> bool:
    """Whether `finish` was not stopped before its end, and has made this fit ("": none is asked for)."""
    found = _recorded(workdir)
    return _VALUE in found and (not fit or found.get("fit", {}).get("by") == fit)


def finish(workdir: Path, command: Sequence[str], fit_by: str, sweep: Sweep, study: Study, signals: Signals) -> None:
    """Writes the record, then runs the best trial's command for each seed.

    Args:
      workdir: the sweep's folder.
      command: the experiment's module, and its flags but `--workdir`.
      fit_by: what a power law is fitted against; "": none is.
      sweep: what was swept.
      study: the trials.
      signals: stop signals.

    Raises:
      UserError: no trial was trained to its end.
      StoppedError: a signal came; the run under way has a checkpoint.
    """
    ranked = report.best(study, sweep)
    if not ranked:
        report.write(workdir, study, sweep, {})
        raise UserError(f"no trial was trained to its end; {workdir}/trials.csv says why")
    first = ranked[0]
    commands = report.commands(command[0], list(command[1:]), sweep, fields(first))
    lines = [report.shell(command) for command in commands]
    figures: dict[str, Any] = {"best_command": "\n".join(lines)}
    report.write(workdir, study, sweep, figures)
    print("\n  ".join([f"best: {report.line(first, sweep.metric)}", *lines]), flush=True)
    figures |= _run(workdir, sweep, first, commands, signals)
    assert first.value is not None, "it is complete"
    if not math.isclose(figures[_VALUE], first.value, rel_tol=1e-6):
        print(
            f"  {sweep.metric} of that command here: {figures[_VALUE]:.4f}; its trial's differs, since a CPU's sums "
            "depend on how many cores make them"
        )
    report.write_summary(workdir, study, sweep, figures)
    if fit_by:  # which may turn out to be impossible: what there is has been recorded
        figures["fit"] = _fit(fit_by, sweep, ranked, workdir)
        report.write_summary(workdir, study, sweep, figures)
    found = report.summary(study, sweep)
    print(
        f"{found['num_trials']} trials ({found['num_pruned']} pruned, {found['num_failed']} failed), "
        f"{found['num_compilations']} compilations, {found['wall_seconds']:.1f} s, "
        f"{found['trials_per_minute']:.1f} trials a minute\n  record: {workdir}/sweep.html"
    )


def _run(
    workdir: Path, sweep: Sweep, best: FrozenTrial, commands: Sequence[Sequence[str]], signals: Signals
) -> dict[str, Any]:
    """The test figures of the commands, and their mean of the metric."""
    runs = []
    for number, command in enumerate(commands):
        folder = workdir / (f"best-{best.number}" + (f"-seed{number}" if sweep.seeds > 1 else ""))
        flags = [*command[2:], f"--workdir={folder}", "--config.distributed.start=never"]
        runs.append(app.run(sweep.experiment, flags, signals, sweep.alone))
    figures: dict[str, Any] = {}
    for name in runs[0]:
        if name.startswith("test_"):
            values = [run[name] for run in runs]
            figures[name] = statistics.mean(values)
            if len(values) > 1:
                figures[f"{name}_std"] = statistics.stdev(values)
    return figures | {_VALUE: statistics.mean(run[sweep.metric] for run in runs)}


def _fit(by: str, sweep: Sweep, ranked: Sequence[FrozenTrial], workdir: Path) -> dict[str, Any]:
    """The power law through the best trials, drawn as fit.png and printed."""
    from launch.sweeps import fit
    from research import plots

    points = fit.measurements(by, sweep, ranked)
    found = fit.fitted(by, "error" if sweep.maximizes else sweep.metric, points)
    plots.scaling_law(found).savefig(workdir / "fit.png", dpi=120)
    print(fit.lines(found), flush=True)
    return found
