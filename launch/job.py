"""What all launchers do first: their own flags, the experiment's, and a check of both before anything starts.

    python -m launch.WHERE experiments.WHAT [flags of WHERE] [flags of WHAT]

A flag that WHERE does not have is the experiment's.
"""

import dataclasses
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from launch.sweeps import options as sweep_options
from research import config as config_lib
from research import flags
from research.errors import UserError
from research.experiment import Experiment
from research.process.exit import exit_with
from research.process.terminal import lasting_output
from research.record.storage import check_no_password

_SWEEP = "launch.sweep"  # what these run as a worker that joins a study
_RUN_WORKERS = ("local", "slurm", "tpu", "gke")
_OF_THEIR_OWN = ("sweep", "scaling")  # records, that is

# Exit codes that another try would end with as well, or must not follow unseen: bad input, a loss that is not finite, a
# full disk, no memory, a device that may compute wrongly.
LASTING = (2, 3, 4, 5, 6)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be launched.

    Attributes:
      module: "experiments.cifar_cnn", or "launch.sweep" for a worker of a sweep.
      experiment: what is trained.
      args: the module's, `--workdir` among them.
      workdir: the folder of the record.
      config: the experiment's, as its flags have it.
      options: the launcher's own, of the dataclass that `parse` was given.
    """

    module: str
    experiment: Experiment
    args: tuple[str, ...]
    workdir: str
    config: Any
    options: Any

    @property
    def command(self) -> list[str]:
        """Runs the experiment with this Python."""
        return [sys.executable, "-m", self.module, *self.args]


def parse_options(where: str, doc: str, options: Any, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Sets the launcher's options, in place, to what its flags say.

    Args:
      where: the launcher's name, as in `python -m launch.<where>`.
      doc: its docstring, which `--help` shows.
      options: a dataclass of `research.config.option` fields with their defaults; each is a flag. A `workdir` among
        them says what that folder is, where it is not that of a new record.
      argv: the arguments.

    Returns:
      `--workdir` ("" where it is not given), and the arguments that are not the launcher's.

    Raises:
      UserError: a value is impossible.
      SystemExit: after `--help`.
    """
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    if not hasattr(options, "workdir"):
        absl_flags.DEFINE_string("workdir", "", "folder of the record", flag_values=values)
    for name, field, value in config_lib.walk(options):
        flags.DEFINE[field.type](name, value, field.metadata["help"], flag_values=values)
    try:
        rest = values([where, *argv], known_only=True)[1:]
    except absl_flags.Error as error:
        raise UserError(str(error)) from None
    if values["help"].value:
        print(_help(where, doc, options))
        raise SystemExit(0)
    for name, _, _ in config_lib.walk(options):
        config_lib.assign(options, name, values[name].value)
    config_lib.check_fields(options, "--")
    return str(values["workdir"].value), rest


def parse(where: str, doc: str, options: Any, argv: Sequence[str]) -> Job:
    """The job that a launcher's command line describes, checked; the arguments are those of `parse_options`.

    Raises:
      UserError: there is no such experiment, or a flag is misspelt or impossible.
      SystemExit: after `--help`.
    """
    workdir, rest = parse_options(where, doc, options, argv)
    modules = [arg for arg in rest if not arg.startswith("-")]
    sweeps = modules[:1] == [_SWEEP] and where in _RUN_WORKERS
    if len(modules) != 1 + sweeps:
        raise UserError(f"name one experiment, as in `python -m launch.{where} experiments.cifar_cnn`")
    experiment = _experiment(modules[-1])
    workdir = workdir or f"runs/{where}/{experiment.name}/{time.strftime('%Y-%m-%d-%H%M%S')}"
    args = [arg for arg in rest if arg.startswith("-")] + ["--processes=0"] * sweeps
    own, options_of_sweep = _sweep_options(workdir, args) if sweeps else (args, None)
    # What only the machines of the run can open is theirs to read.
    check_no_password(workdir)
    remote = "://" in workdir
    if where in _OF_THEIR_OWN and not remote and (Path(workdir) / "config.json").exists():
        raise UserError(f"--workdir={workdir} holds a run, whose config it would take: give a folder of its own")
    checked = [arg for arg in own if not arg.startswith("--mode")] if remote else [*own, f"--workdir={workdir}"]
    config = flags.parse(experiment, checked, [name for name, _, _ in config_lib.walk(options)]).config
    if options_of_sweep:
        _check_sweep(where, experiment, options_of_sweep, config)
    worker = [modules[-1], *args] if sweeps else args
    return Job(modules[0], experiment, (*worker, f"--workdir={workdir}"), workdir, config, options)


def _sweep_options(workdir: str, args: Sequence[str]) -> tuple[list[str], Any]:
    """Of the flags of a sweep's worker those of the experiment, and the sweep's own options."""
    options = sweep_options.SweepOptions()
    _, rest = parse_options("sweep", "", options, args)
    sweep_options.check_place(workdir, options)
    return rest, options


def _check_sweep(where: str, experiment: Experiment, options: Any, config: Any) -> None:
    """Raises `UserError` where a worker elsewhere could not begin; a search space only where Optuna is installed."""
    for text in options.search if where in ("tpu", "gke") else ():
        if Path(text).is_absolute():
            raise UserError(f"--search={text}: the machines have this project alone; give a path within it")
    if importlib.util.find_spec("optuna"):
        sweep_options.check_search(experiment, options, config)


def check_remote(job: Job) -> None:
    """Raises `UserError` where what a run leaves would be on a disk of machines that go when it ends."""
    if "://" not in job.workdir:
        raise UserError(f"--workdir={job.workdir}: the machines' own disks go with them; give gs://BUCKET/FOLDER")


def check_local(workdir: str) -> None:
    """Raises `UserError` where the workdir is not on this machine."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: this record is on a local disk; give a folder of this machine")


def make_folder(workdir: str) -> Path:
    """Makes the record's folder before there is anything to record, so that one that cannot be made costs nothing.

    Raises:
      UserError: it cannot be made, or is not on this machine.
    """
    check_local(workdir)
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be made: {error.strerror}") from None
    return folder


def _experiment(module: str) -> Experiment:
    try:
        found = importlib.import_module(module)
    except (ModuleNotFoundError, TypeError, ValueError) as error:  # "", and names that begin with a dot
        raise UserError(f"there is no {module} ({error}): name a module, as in experiments.cifar_cnn") from None
    if not isinstance(experiment := getattr(found, "EXPERIMENT", None), Experiment):
        raise UserError(f"{module} defines no EXPERIMENT, by which launchers know its flags")
    return experiment


def _help(where: str, doc: str, options: Any) -> str:
    lines = [doc.strip(), ""]
    if not hasattr(options, "workdir"):
        lines.append(f"  --workdir=DIR  folder of the record (default: runs/{where}/<what>/<date-time>)")
    for name, field, value in config_lib.walk(options):
        lines += flags.field_help(name, field, value)
    lines += ["", "All other flags are the experiment's: `python -m experiments.WHAT --help` lists them."]
    return "\n".join(lines)


def main(run: Callable[[Sequence[str]], int]) -> None:
    """A launcher's whole command: exits with what `run` returns, or says in one line what was wrong."""
    try:
        with lasting_output():
            sys.exit(run(sys.argv[1:]))
    except UserError as error:
        exit_with(error)
