"""The command line that all launchers share: the launcher's flags and the experiment's, checked before anything starts.

    python -m launch.WHERE experiments.WHAT [flags of WHERE] [flags of WHAT]

Flags that WHERE does not define are passed on to the experiment, in the form in which they were given.
"""

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from launch.sweeps import options as sweep_options
from research import config as config_lib
from research import flags
from research.errors import UserError
from research.experiment import Experiment
from research.paths import check_no_password
from research.process.exit import exit_with
from research.process.terminal import ignore_output_errors
from research.record.workdir import default_workdir

_SWEEP = "launch.sweep"
_RUN_SWEEP_WORKERS = ("local", "slurm", "tpu", "gke")  # these accept `launch.sweep experiments.WHAT`
_KEEP_OWN_RECORD = ("sweep", "scaling")  # their --workdir must not be that of a run

# Exit codes after which a restart would fail again or hide the problem: bad input, non-finite loss, full disk, out of
# memory, a device that may compute wrong results (research/errors.py).
NON_RETRYABLE_EXIT_CODES = (2, 3, 4, 5, 6)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job to launch.

    Attributes:
      module: "experiments.cifar_cnn", or "launch.sweep" for a sweep worker.
      experiment: the experiment to train.
      args: the module's arguments, without `--workdir`.
      workdir: the folder for the record.
      config: the experiment's config, with its flags applied.
      options: the launcher's options, the dataclass that `parse` was given.
      given: names of the experiment's flags that the command line sets, such as "config.batch_size".
    """

    module: str
    experiment: Experiment
    args: tuple[str, ...]
    workdir: str
    config: Any
    options: Any
    given: frozenset[str]

    @property
    def module_command(self) -> list[str]:
        """The module and all of its arguments: what follows `python -m`."""
        return [self.module, *self.args, f"--workdir={self.workdir}"]

    @property
    def command(self) -> list[str]:
        """Runs the module with this Python interpreter."""
        return [sys.executable, "-m", *self.module_command]


def parse_options(where: str, doc: str, options: Any, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Sets a launcher's options, in place, from its flags.

    Args:
      where: the launcher's name, as in `python -m launch.<where>`.
      doc: its docstring, which `--help` shows.
      options: a dataclass of `research.config.option` fields with defaults; each becomes a flag. It defines `workdir`
        itself where that folder is not a new record.
      argv: the arguments.

    Returns:
      The value of `--workdir` ("" if not given), and the arguments that the launcher does not define.

    Raises:
      UserError: a value is invalid.
      SystemExit: after `--help`.
    """
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not hasattr(options, "workdir"):
        absl_flags.DEFINE_string("workdir", "", "folder for the record", flag_values=values)
    for name, field, value in config_lib.walk(options):
        flags.DEFINE[field.type](name, value, field.metadata["help"], flag_values=values)
    rest = _parse_flags(values, argv, known_only=True)
    if values["help"].value:
        print(_help(where, doc, options))
        raise SystemExit(0)
    for name, _, _ in config_lib.walk(options):
        config_lib.assign(options, name, values[name].value)
    config_lib.check_fields(options, "--")
    return str(values["workdir"].value), rest


def _parse_flags(values: absl_flags.FlagValues, argv: Sequence[str], *, known_only: bool = False) -> list[str]:
    """Parses flags in every form that absl accepts; returns the arguments that are left, in order."""
    try:
        return values(["launch", *argv], known_only=known_only)[1:]
    except (absl_flags.Error, ValueError) as error:  # ValueError: --noFLAG=VALUE
        raise UserError(str(error)) from None


def parse(where: str, doc: str, options: Any, argv: Sequence[str]) -> Job:
    """Parses and checks a launcher's command line; the arguments are those of `parse_options`.

    Raises:
      UserError: the experiment does not exist, or a flag is unknown or invalid.
      SystemExit: after `--help`.
    """
    workdir, rest = parse_options(where, doc, options, argv)
    own, worker = rest, None
    if _SWEEP in rest and where in _RUN_SWEEP_WORKERS:
        rest = _without(rest, _SWEEP)
        worker = sweep_options.SweepOptions()
        _, own = parse_options("sweep", "", worker, rest)
        worker.processes = 0
    module = _experiment_module(where, own)
    own = _without(own, module)
    experiment = _experiment(module)
    workdir = os.path.expanduser(workdir) or default_workdir(where, experiment.name)
    check_no_password(workdir)
    is_remote = "://" in workdir
    if where in _KEEP_OWN_RECORD and not is_remote and (Path(workdir) / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds a run: give launch.{where} a folder for its own record")
    values = flags.parse_flags(experiment, own, [name for name, _, _ in config_lib.walk(options)])
    given = flags.given_flags(values)
    for name in ("tracker", "profile", "describe"):
        if name in given and (worker or where not in _RUN_SWEEP_WORKERS):
            raise UserError(f"--{name} is for the runs of an experiment, not of this command: leave it out")
    if is_remote:
        # Only the machines of the run may be able to open the workdir, so other modes cannot be checked here.
        values["mode"].value, values["checkpoint"].value = "train", "newest"
    else:
        values["workdir"].value = workdir
    config = flags.make_command(experiment, values).config
    if not worker:
        return Job(module, experiment, tuple(own), workdir, config, options, given)
    sweep_options.check_place(workdir, worker)
    _check_sweep(where, experiment, worker, config)
    return Job(_SWEEP, experiment, (module, *_without(rest, module), "--processes=0"), workdir, config, options, given)


def _experiment_module(where: str, args: Sequence[str]) -> str:
    """The argument that names the experiment.

    The experiment's flags are unknown until it is imported, so any argument without dashes may be the value of one, as
    in `--config.seed 3 experiments.cifar_cnn`: the first that names a module is the experiment.
    """
    candidates = [arg for arg in args if not arg.startswith("-")]
    if not candidates or _SWEEP in candidates:
        raise UserError(f"name one experiment, as in `python -m launch.{where} experiments.cifar_cnn`")
    return next(filter(_is_module, candidates), candidates[0])


def _is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a parent package is missing; "", or a name that begins with a dot
        return False
    return spec is not None and spec.has_location  # a folder of the working directory has none


def _without(args: Sequence[str], arg: str) -> list[str]:
    """A copy without the first occurrence of `arg`."""
    index = args.index(arg)
    return [*args[:index], *args[index + 1 :]]


def _check_sweep(where: str, experiment: Experiment, options: Any, config: Any) -> None:
    """Raises `UserError` where a worker could not begin; the search space is checked only if Optuna is installed."""
    for text in options.search if where in ("tpu", "gke") else ():
        if Path(os.path.expanduser(text)).is_absolute():
            raise UserError(f"--search={text}: only this repository is copied to the machines; give a path within it")
    if importlib.util.find_spec("optuna"):
        sweep_options.check_search(experiment, options, config)


def check_remote(job: Job) -> None:
    """Raises `UserError` where the workdir is on the local disk of machines that are deleted after the run."""
    if "://" not in job.workdir:
        raise UserError(
            f"--workdir={job.workdir} is a local folder, which is lost with the machines: give gs://BUCKET/FOLDER"
        )


def check_local(workdir: str) -> None:
    """Raises `UserError` where the workdir is not on this machine."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: this record must be on a local disk; give a folder on this machine")


def make_folder(workdir: str) -> Path:
    """Creates the folder for the record, before any work is done that could not be recorded.

    Raises:
      UserError: it cannot be created, or is not on this machine.
    """
    check_local(workdir)
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be created: {error.strerror}") from None
    return folder


def _experiment(module: str) -> Experiment:
    try:
        found = importlib.import_module(module)
    except (ModuleNotFoundError, TypeError, ValueError) as error:  # "", and names that begin with a dot
        raise UserError(f"cannot import {module} ({error}): name a module, as in experiments.cifar_cnn") from None
    if not isinstance(experiment := getattr(found, "EXPERIMENT", None), Experiment):
        raise UserError(f"{module} does not define EXPERIMENT, from which launchers read its flags")
    return experiment


def _help(where: str, doc: str, options: Any) -> str:
    lines = [doc.strip(), ""]
    if not hasattr(options, "workdir"):
        default = f"runs/{where}/<experiment>/<date-time>-<random>"
        lines.append(f"  --workdir=DIR  folder for the record (default: {default})")
    for name, field, value in config_lib.walk(options):
        lines += flags.field_help(name, field, value)
    lines += ["", "All other flags are the experiment's: `python -m experiments.WHAT --help` lists them."]
    return "\n".join(lines)


def main(run: Callable[[Sequence[str]], int]) -> None:
    """Runs a launcher as a command: exits with the code that `run` returns, or prints the error in one line."""
    try:
        with ignore_output_errors():
            sys.exit(run(sys.argv[1:]))
    except UserError as error:
        exit_with(error)
