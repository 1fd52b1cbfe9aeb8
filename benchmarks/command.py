"""The entry point of the benchmarks, and Python commands run in subprocesses."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

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


def run(name: str, args: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs `python ARGS` with additional environment variables and returns its stdout.

    Raises:
      SystemExit: the command failed; the message has `name` and the last line of its stderr.
    """
    done = subprocess.run(
        [sys.executable, *args], env=os.environ | dict(environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output on stderr"])[-1]
        raise SystemExit(f"error: {name} failed: {last}")
    return done.stdout
