"""The command line of an experiment: flags -> `Command`, with a checked Config.

Every field of the experiment's Config is an absl flag, `--config.<path>`; `--config=PRESET` picks where they start.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from research import config as config_lib
from research import earlier_runs
from research.config import Config
from research.errors import UserError
from research.experiment import Experiment
from research.paths import open_path
from research.record import trackers
from research.record.workdir import default_workdir


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
      config: checked, not yet resolved.
      workdir: the folder of the record.
      given: the names of the flags that were given, as in "config.seed".
      mode: "train", "eval" or "sample".
      checkpoint: "newest", "best" or a step, for the modes "eval" and "sample".
      options: the options of the mode "sample".
      earlier: the config of the run in `workdir`, or None.
      reproduces: the summary of the run to reproduce, or None.
      trackers: the names of the trackers that receive the record.
      profile: the text of --profile, or "".
      describe: whether to describe the training that this command would start, instead of starting it.
    """

    config: Config
    workdir: Path
    given: frozenset[str]
    mode: str
    checkpoint: str
    options: Any
    earlier: Config | None
    reproduces: dict[str, Any] | None
    trackers: tuple[str, ...]
    profile: str
    describe: bool


class _OptionalFloatParser(absl_flags.FloatParser):
    """Parses a float or "None"."""

    def convert(self, argument: Any) -> Any:
        return None if argument == "None" else super().convert(argument)


def _define_optional_float(name: str, default: float | None, help: str, flag_values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE(_OptionalFloatParser(), name, default, help, flag_values)


DEFINE: dict[Any, Callable[..., Any]] = {
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    float | None: _define_optional_float,
    bool: absl_flags.DEFINE_boolean,
    str: absl_flags.DEFINE_string,
    tuple[str, ...]: absl_flags.DEFINE_multi_string,
}


def define_flags(experiment: Experiment) -> absl_flags.FlagValues:
    """Defines the flags of an experiment, in a new set."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    absl_flags.DEFINE_string("workdir", None, "folder of the run's record", flag_values=values)
    absl_flags.DEFINE_enum("mode", "train", list(experiment.modes), "what to do", flag_values=values)
    absl_flags.DEFINE_string("checkpoint", "newest", "checkpoint to use", flag_values=values)
    absl_flags.DEFINE_string("reproduce", None, "summary.json of a run to run again", flag_values=values)
    absl_flags.DEFINE_string("tracker", None, "trackers that receive the record", flag_values=values)
    absl_flags.DEFINE_string("profile", "", "steps to profile", flag_values=values)
    absl_flags.DEFINE_boolean("describe", False, "describe the training", flag_values=values)
    names = list(experiment.presets)
    absl_flags.DEFINE_enum("config", names[0], names, "the preset to start from", flag_values=values)
    for prefix, options in _groups(experiment):
        for path, field, value in config_lib.walk(options, prefix):
            DEFINE[field.type](path, value, field.metadata["help"], flag_values=values)
    return values


def _groups(experiment: Experiment) -> list[tuple[str, Any]]:
    """The dataclasses whose fields are flags, each with the prefix of the flags."""
    options = experiment.sample_options
    return [*([("", options())] if options else []), ("config.", experiment.default_config)]


def given_flags(values: absl_flags.FlagValues) -> frozenset[str]:
    """The names of the flags that the parsed arguments contained."""
    return frozenset(name for name in values if values[name].present)


def help_text(experiment: Experiment) -> str:
    """The text of `--help`: the docstring, and every flag with its type, default and help."""
    lines = [
        experiment.doc.strip(),
        "",
        f"  --workdir=DIR  folder of the run's record (default: runs/{experiment.name}/<date-time>-<random>)",
        *(f"  --mode={name}  {meaning}" for name, meaning in experiment.modes.items()),
        "  --checkpoint=newest|best|STEP  the checkpoint to evaluate or to sample from (best: lowest validation loss)",
        "  --reproduce=DIR/summary.json  run that run again, with its config",
        f"  --tracker={','.join(trackers.CLIENTS)}  trackers that receive the record, too; --tracker= for none "
        "(default: those of the run in --workdir)",
        "  --profile=FIRST:LAST  profile the steps after FIRST, up to LAST: a trace in the workdir, a table here",
        "  --describe  print the network, memory of a device, FLOPs, mesh and config of this training; do not start it",
        f"  --config=NAME  the preset to start from: {', '.join(experiment.presets)}",
        "",
    ]
    for prefix, options in _groups(experiment):
        for path, field, value in config_lib.walk(options, prefix):
            lines += field_help(path, field, value, "" if prefix else ", with --mode=sample")
    return "\n".join(lines)


def field_help(path: str, field: dataclasses.Field, value: Any, when: str = "") -> list[str]:
    """The lines of `--help` for one flag: type, default, help and choices; `when` says in which mode it is used."""
    kind = {float | None: "float", tuple[str, ...]: "str"}.get(field.type, getattr(field.type, "__name__", ""))
    default = {"": "empty", (): "none", None: "see below"}.get(value, value)
    choices = " | ".join(c or "''" for c in field.metadata["choices"])
    first = f"  --{path}={kind} (default: {default}){when}"
    return [first, f"      {field.metadata['help']}" + (f": {choices}" if choices else "")]


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known names closest to a wrong one: the same field of another group, its initials, or a similar spelling."""
    last = {flag: flag.rpartition(".")[2] for flag in known}
    word = name.rpartition(".")[2]
    near = [flag for flag in known if last[flag] == word]
    near = near or [flag for flag in known if "_" in last[flag] and re.sub(r"([^_])[^_]*_?", r"\1", last[flag]) == word]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [flag for flag in known if last[flag] in difflib.get_close_matches(word, last.values(), n=1)]
    return near or [flag for flag in known if word in last[flag].split("_")]


def _unknown(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known)
    meant = f": did you mean {' or '.join(f'--{flag}' for flag in near)}?" if near else ""
    return f"unknown flag --{name}{meant or '; --help lists them all'}"


def parse(experiment: Experiment, argv: Sequence[str]) -> Command:
    """Parses and checks the arguments: `parse_flags`, then `make_command`; raises what these raise."""
    return make_command(experiment, parse_flags(experiment, argv))


def parse_flags(experiment: Experiment, argv: Sequence[str], launcher: Sequence[str] = ()) -> absl_flags.FlagValues:
    """Parses the arguments.

    Args:
      experiment: whose command line it is.
      argv: the arguments.
      launcher: names of the launcher's flags, which the error for an unknown flag may suggest.

    Raises:
      UserError: an unknown flag (with the nearest known one), or a value of the wrong type.
      SystemExit: after `--help`.
    """
    values = define_flags(experiment)
    try:
        rest = values([experiment.name, *argv])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, [*launcher, *values])) from None
    except (absl_flags.Error, ValueError) as error:  # ValueError: --noFLAG=VALUE
        raise UserError(str(error)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    if values["help"].value:
        print(help_text(experiment))
        raise SystemExit(0)
    return values


def make_command(experiment: Experiment, values: absl_flags.FlagValues) -> Command:
    """Builds the command from parsed flags.

    The config starts from the preset if one is given, else from the config of the run to reproduce, else from that of
    the run in --workdir, else from the first preset; then the given flags are applied.

    Raises:
      UserError: a value is out of bounds, flags contradict each other, or there is no such run.
    """
    workdir = open_path(values["workdir"].value or default_workdir(experiment.name))
    earlier = earlier_runs.config_of(experiment, workdir)
    mode = str(values["mode"].value)
    if mode != "train" and earlier is None:
        # Names no --mode, which the caller of `research.load` has not given.
        where = f"there is no config.json in {workdir}: " if values["workdir"].value else ""
        raise UserError(f"{where}give the --workdir of a run")
    checkpoint = _checkpoint(values, mode)
    reproduces, reproduced = earlier_runs.to_reproduce(experiment, values["reproduce"].value, mode)
    config = experiment.presets[str(values["config"].value)]()
    if not values["config"].present:
        config = copy.deepcopy(reproduced or earlier or config)
    for path, field, value in config_lib.walk(config):
        flag = values[f"config.{path}"]
        if flag.present:
            if reproduced and not values["config"].present and field.metadata["decides_others"] and flag.value != value:
                raise UserError(
                    f"--config.{path}={flag.value}: the record of --reproduce has {value}, and what that left open was "
                    "filled in for it: give the flags without --reproduce"
                )
            config_lib.assign(config, path, flag.value)
    _check_length(config, values)
    config_lib.check(config)
    options = _sample_options(experiment, values, mode)
    does = f"--mode={mode}" if mode != "train" else "--describe" if values["describe"].value else ""
    for name in ("tracker", "profile", *(["describe"] if mode != "train" else [])):
        if does and values[name].value:
            raise UserError(f"--{name}={values[name].value} is for training: leave it or {does} out")
    tracked = () if does else trackers.parse(values["tracker"].value, workdir)
    return Command(
        config,
        workdir,
        given_flags(values),
        mode,
        checkpoint,
        options,
        earlier,
        reproduces,
        tracked,
        str(values["profile"].value),
        bool(values["describe"].value),
    )


def _check_length(config: Config, values: absl_flags.FlagValues) -> None:
    """Raises `UserError` if --config.num_epochs is given, but `num_steps` decides the length of training."""
    if config.num_steps and values["config.num_epochs"].present:
        raise UserError(
            f"--config.num_epochs={config.num_epochs} has no effect, since --config.num_steps={config.num_steps} "
            "decides the length of training: leave it out, or set --config.num_steps=0"
        )


def _checkpoint(values: absl_flags.FlagValues, mode: str) -> str:
    checkpoint = str(values["checkpoint"].value)
    if not re.fullmatch(r"newest|best|[0-9]{1,18}", checkpoint):
        raise UserError(f"--checkpoint={checkpoint}: give newest, best or the number of a step")
    if mode == "train" and checkpoint != "newest":
        raise UserError(
            f"--checkpoint={checkpoint} is for evaluation, sampling and export: training resumes from the newest"
        )
    return checkpoint


def _sample_options(experiment: Experiment, values: absl_flags.FlagValues, mode: str) -> Any:
    if experiment.sample_options is None:
        return None
    options = experiment.sample_options()
    for name, _, _ in config_lib.walk(options):
        if values[name].present and mode != "sample":
            raise UserError(f"--{name} is for --mode=sample")
        config_lib.assign(options, name, values[name].value)
    config_lib.check_fields(options, "--")
    return options
