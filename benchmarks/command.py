"""The entry point of the benchmarks, numbers in their flags, and Python commands run in subprocesses."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from research.errors import UserError
from research.process.exit import exit_with
from research.process.terminal import ignore_output_errors


def start(main: Callable[[], None]) -> None:
    """Runs a benchmark with its flags parsed; bad input prints one line and exits with code 2."""

    def parsed(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)[1:]
        except flags.Error as error:
            exit_with(UserError(str(error)))
        if rest:
            exit_with(UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value"))
        return list(argv)

    def run_main(_: Sequence[str]) -> None:
        try:
            main()
        except UserError as error:
            exit_with(error)

    with ignore_output_errors():
        app.run(run_main, flags_parser=parsed)


def numbers(
    flag: str, values: Sequence[str], kind: type = float, fewest: int = 1, purpose: str = ""
) -> tuple[Any, ...]:
    """Parses the values of a list flag, each of type `kind`; returns them sorted.

    Raises:
      UserError: they are not all positive and finite, or fewer than `fewest` are different, which `purpose` explains.
    """
    try:
        parsed = [kind(value) for value in values]
    except ValueError:
        parsed = []
    if len(set(parsed)) < fewest or not all(0 < number < math.inf for number in parsed):
        need = f", at least {fewest} {purpose}" if fewest > 1 else ""
        raise UserError(f"--{flag}={','.join(values)}: give positive numbers separated by commas{need}")
    return tuple(sorted(parsed))


class CommandError(SystemExit):
    """A command that `run` started has failed; ends this process with a message unless it is caught."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run(name: str, args: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs `python ARGS` with additional environment variables and returns its stdout.

    Raises:
      CommandError: the command failed; the message has `name` and the last line of its stderr.
    """
    done = subprocess.run(
        [sys.executable, *args], env=os.environ | dict(environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output on stderr"])[-1]
        raise CommandError(f"error: {name} failed: {last}", done.returncode)
    return done.stdout
