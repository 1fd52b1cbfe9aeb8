"""The runs that a command line refers to: the one in --workdir, and the one to --reproduce."""

from pathlib import Path
from typing import Any

from research.config import Config
from research.errors import UserError
from research.experiment import Experiment
from research.paths import open_path
from research.record import config_json
from research.record.workdir import read_json


def config_of(experiment: Experiment, workdir: Path) -> Config | None:
    """Returns the config in a workdir, or None if it has none."""
    path = workdir / "config.json"
    values = read_json(path)
    return None if values is None else config_json.load(experiment.default_config, values, str(path))


def to_reproduce(experiment: Experiment, url: str | None, mode: str) -> tuple[dict[str, Any] | None, Config | None]:
    """Returns the summary and the config of the run that --reproduce names by its summary.json, or (None, None).

    Raises:
      UserError: there is no such run, it was extended, or the mode is not training.
    """
    if not url:
        return None, None
    path = open_path(url)
    summary, config = read_json(path), config_of(experiment, path.parent)
    if summary is None or config is None:
        raise UserError(f"--reproduce={path}: there is no such file, or no config.json beside it")
    if "num_train_steps" not in summary:
        raise UserError(f"--reproduce={path}: this is not the summary.json of a run")
    _check_not_extended(path, summary)
    if (length := _length(summary)) != (other := "{}={}".format(*config.length)):
        raise UserError(
            f"--reproduce={path}: this summary is of {length}, but config.json has {other}: finish that extension, or "
            f"train with --config.{length}"
        )
    if mode != "train":
        raise UserError(f"--reproduce is for training: leave it or --mode={mode} out")
    return summary, config


def _length(values: dict[str, Any]) -> str:
    """Returns the length of training in a summary, or in one of its extensions, as a flag: "num_epochs=10"."""
    name = "num_steps" if "num_steps" in values else "num_epochs"
    return f"{name}={values[name]}"


def _check_not_extended(path: Path, reproduces: dict[str, Any]) -> None:
    """Raises `UserError` if the run was extended: a new run would use its final schedules from the first step."""
    if extended := reproduces.get("extended"):
        parts = [f"{_length(part)} up to step {part['step']}" for part in extended]
        raise UserError(
            f"--reproduce={path}: this run had the schedules of {', of '.join(parts)}, and then those of "
            f"{_length(reproduces)}, which a new run would have from the start: train with "
            f"--config.{_length(extended[0])}, and extend that run in the same way"
        )
