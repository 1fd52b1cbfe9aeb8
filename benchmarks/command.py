"""A benchmark's own command, and one of Python in a process of its own, as the comparisons run it."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags

from research.errors import UserError
from research.process.exit import exit_with


def start(main: Callable[[], None]) -> None:
    """A benchmark's whole command: runs it with its flags parsed, or says in one line what was wrong (exit code 2)."""

    def parsed(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)[1:]
        except flags.Error as error:
            exit_with(UserError(str(error)))
        if rest:
            exit_with(UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value"))
        return list(argv)

    def run_it(_: Sequence[str]) -> None:
        try:
            main()
        except UserError as error:
            exit_with(error)

    app.run(run_it, flags_parser=parsed)


def run(name: str, args: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What `python ARGS` prints, its environment this one's and more.

    Raises:
      SystemExit: it failed; with `name` and the last line of its stderr.
    """
    done = subprocess.run(
        [sys.executable, *args], env=os.environ | dict(environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["in silence"])[-1]
        raise SystemExit(f"error: {name} failed: {last}")
    return done.stdout
