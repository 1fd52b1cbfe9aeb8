"""Compares runs: the config fields in which they differ, their final metrics, and a plot of their curves.

python -m research.compare DIR DIR ... [--plot=compare.png]
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from research import plots
from research.errors import UserError
from research.paths import open_path
from research.process.terminal import ignore_output_errors
from research.record import drawing
from research.record.workdir import read_json, read_metrics

_METRICS = ("train_", "validation_", "test_", "best_", "examples_per_second", "num_params", "num_train_steps")


def _leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config to {"section.field": value}."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def table(workdirs: Sequence[Path]) -> list[list[str]]:
    """Returns a heading, then a row for each config field that differs and for each final metric; a column per run.

    Raises:
      UserError: a folder holds no run.
    """
    configs, summaries = [], []
    for workdir in workdirs:
        config = read_json(workdir / "config.json")
        if config is None or not (workdir / "metrics.jsonl").exists():
            raise UserError(f"{workdir} holds no run: config.json or metrics.jsonl is missing")
        configs.append(_leaves(config))
        summaries.append(read_json(workdir / "summary.json") or {})
    rows = [["", *map(str, workdirs)]]
    for name in sorted({name for config in configs for name in config}):
        values = [config.get(name, "-") for config in configs]
        if any(value != values[0] for value in values):
            rows.append([f"config.{name}", *map(str, values)])
    for name in dict.fromkeys(name for summary in summaries for name in summary if name.startswith(_METRICS)):
        rows.append([name, *(_text(summary.get(name, "-")) for summary in summaries)])
    return rows


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(argv: Sequence[str]) -> None:
    """Prints the table and saves the plot.

    Raises:
      UserError: bad input.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    flags.DEFINE_string("plot", "compare.png", "file of the plot", flag_values=values)
    try:
        workdirs = [open_path(name) for name in values(["compare", *argv])[1:]]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values["help"].value:
        print(str(__doc__).strip())
        return
    if not workdirs:
        raise UserError("give the workdirs of the runs: python -m research.compare DIR DIR ...")
    rows = table(workdirs)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    lines = {str(workdir): read_metrics(workdir) for workdir in workdirs}
    if not any("train_loss" in line for run in lines.values() for line in run):
        print("no plot: no run has recorded metrics yet")
        return
    path = open_path(str(values["plot"].value))
    figure = drawing.attempt(f"{path.name} was not drawn", lambda: plots.curves(lines))
    if figure is None:
        return
    try:
        # In memory first: the path may be remote, and an error must not leave a partial file.
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=120)
        path.write_bytes(buffer.getvalue())
    except (OSError, ValueError) as error:
        raise UserError(f"--plot={path} cannot be written: {error}") from None
    print(f"plot: {path}")


if __name__ == "__main__":
    try:
        with ignore_output_errors():
            run(sys.argv[1:])
    except UserError as user_error:
        print(f"error: {user_error}", file=sys.stderr)
        sys.exit(user_error.exit_code)
