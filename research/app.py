"""An experiment's command line: flags -> Config -> data, mesh -> `train_and_evaluate` -> the summary on the terminal.

Every field of the experiment's Config is an absl flag, `--config.<path>`; `--config=PRESET` picks where they start.
"""

import dataclasses
import difflib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from research import config as config_lib
from research.config import Config
from research.data import sources
from research.errors import UserError
from research.tasks import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What an experiment's file defines.

    Attributes:
      name: as in `python -m experiments.<name>`, and the folder of its runs.
      doc: its docstring, which `--help` shows.
      presets: functions that make its configs, by name; the first is the default.
      make_task: builds the task from the config and the data set; may raise `UserError`.
    """

    name: str
    doc: str
    presets: Mapping[str, Callable[[], Config]]
    make_task: Callable[[Any, sources.Dataset], Task]

    @property
    def default_config(self) -> Config:
        """The config of the first preset."""
        return next(iter(self.presets.values()))()


_DEFINE: dict[Any, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    float | None: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    str: flags.DEFINE_string,
}


def define_flags(experiment: Experiment) -> flags.FlagValues:
    """The flags of an experiment, in a set of their own."""
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run's record", flag_values=values)
    names = list(experiment.presets)
    flags.DEFINE_enum("config", names[0], names, "the preset to start from", flag_values=values)
    for path, field, value in config_lib.walk(experiment.default_config):
        _DEFINE[field.type](f"config.{path}", value, field.metadata["help"], flag_values=values)
    return values


def help_text(experiment: Experiment) -> str:
    """The docstring, and every flag with its type, default and meaning."""
    lines = [
        experiment.doc.strip(),
        "",
        f"  --workdir=DIR  folder of the run's record (default: runs/{experiment.name}/<date-time>)",
        f"  --config=NAME  the preset to start from: {', '.join(experiment.presets)}",
        "",
    ]
    for path, field, value in config_lib.walk(experiment.default_config):
        kind = getattr(field.type, "__name__", "float")
        default = {"": "empty", None: "see below"}.get(value, value)
        choices = " | ".join(c or "''" for c in field.metadata["choices"])
        lines.append(f"  --config.{path}={kind} (default: {default})")
        lines.append(f"      {field.metadata['help']}" + (f": {choices}" if choices else ""))
    return "\n".join(lines)


def _unknown(name: str, known: list[str]) -> str:
    """Names the nearest right flags: the same field of another group, else one spelt alike."""
    last = {flag: flag.rpartition(".")[2] for flag in known}
    word = name.rpartition(".")[2]
    near = [flag for flag in known if last[flag] == word]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    near = near or [flag for flag in known if last[flag] in difflib.get_close_matches(word, last.values(), n=1)]
    near = near or [flag for flag in known if word in last[flag].split("_")]
    meant = f": did you mean {' or '.join(f'--{flag}' for flag in near)}?" if near else ""
    return f"unknown flag --{name}{meant or '; --help lists them all'}"


def parse(experiment: Experiment, argv: Sequence[str]) -> tuple[Config, str | None]:
    """The checked config and the workdir (None: not given) that the arguments ask for.

    Raises:
      UserError: an unknown flag (the nearest right one is named), an ill-typed or impossible value.
      SystemExit: after `--help`.
    """
    values = define_flags(experiment)
    try:
        rest = values([experiment.name, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, list(values))) from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
    if values["help"].value:
        print(help_text(experiment))
        raise SystemExit(0)
    config = experiment.presets[str(values["config"].value)]()
    for path, _, _ in config_lib.walk(config):
        flag = values[f"config.{path}"]
        if flag.present:
            config_lib.assign(config, path, flag.value)
    config_lib.check(config)
    return config, values["workdir"].value


def run(experiment: Experiment, argv: Sequence[str]) -> dict[str, Any]:
    """Runs the experiment as the arguments say; returns what summary.json holds.

    Raises:
      UserError: bad input, found before training starts; no folder is left behind.
    """
    # Imported here so that --help and a misspelt flag answer at once.
    from research import optimizers, sharding, train, writer

    config, given = parse(experiment, argv)
    optimizers.resolve(config.optimizer)
    workdir = Path(given or f"runs/{experiment.name}/{time.strftime('%Y-%m-%d-%H%M%S')}")
    mesh = sharding.make_mesh(config)
    made = writer.create_workdir(workdir)
    try:
        dataset = sources.load(config.dataset)
        config.dataset.name = dataset.name
        task = experiment.make_task(config, dataset)
        print(_first_line(experiment, dataset, mesh), flush=True)
        _, summary = train.train_and_evaluate(experiment.name, config, task, dataset, mesh, workdir)
    except BaseException:
        if not (workdir / "config.json").exists():
            writer.discard(made)
        raise
    print(_last_lines(summary, workdir))
    return summary


def _devices(count: int, platform: str) -> str:
    return f"{count} {platform} device{'s' if count != 1 else ''}"


def _first_line(experiment: Experiment, dataset: sources.Dataset, mesh: Any) -> str:
    sizes = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    counts = ", ".join(f"{len(split['label']):,} {name}" for name, split in sizes.items() if split is not None)
    return f"{experiment.name}: {dataset.name} ({counts}), {_devices(mesh.size, mesh.devices.flat[0].platform)}"


def _last_lines(summary: dict[str, Any], workdir: Path) -> str:
    tests = ", ".join(f"{n.replace('_', ' ')} {v:.4f}" for n, v in summary.items() if n.startswith("test_"))
    return (
        f"{summary['experiment']} on {summary['dataset']}: {tests}\n"
        f"  {summary['examples_per_second']:,.0f} examples/s over {summary['train_seconds']:.1f} s of training "
        f"(compiling apart: {summary['compile_seconds']:.1f} s), "
        f"{_devices(summary['device_count'], summary['platform'])}\n"
        f"  record: {workdir}"
    )


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> None:
    """The whole command: runs the experiment and exits with one of the codes of `research.errors`."""
    try:
        run(experiment, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        sys.exit(_complain(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def _complain(text: str, exit_code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return exit_code
