"""The command line of the commands that prepare data: `--name=value` flags, errors in one line, an exit code."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from research.errors import UserError


def new_flags(what: str, out: str) -> flags.FlagValues:
    """Defines the flags that all of these commands have.

    Args:
      what: what --name names, for --help.
      out: what --out is, for --help.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    flags.DEFINE_string("name", "", f"the {what}, as in --config.dataset.name", flag_values=values)
    flags.DEFINE_string("data_dir", "", "its folder, as in --config.dataset.data_dir", flag_values=values)
    flags.DEFINE_string("out", "", out, flag_values=values)
    return values


def parse(values: flags.FlagValues, argv: Sequence[str], doc: str, example: str) -> dict[str, Any]:
    """Parses the arguments and returns the value of each flag; prints the help and returns {} if that is asked for.

    Args:
      values: the flags of the command, not parsed yet.
      argv: the arguments.
      doc: the command's docstring, the beginning of its help.
      example: the flags that must be given, for the message if one is missing.

    Raises:
      UserError: an argument is unknown or of the wrong type, or --name or --out is missing.
    """
    try:
        unexpected = values(["", *argv])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values["help"].value:
        print(f"{doc.strip()}\n\n{values.get_help()}".rstrip())
        return {}
    if unexpected:
        raise UserError(f"unexpected {unexpected[0]!r}: every option is of the form --name=value; --help lists them")
    for flag in ("name", "out"):
        if not values[flag].value:
            raise UserError(f"--{flag} is missing: give {example}; --help lists the options")
    return values.flag_values_dict()


def start(run: Callable[[Sequence[str]], None], argv: Sequence[str], interrupted: str) -> None:
    """Runs a command; an error is one line on stderr and an exit code (see `research.errors`).

    Args:
      run: the command, which may raise `UserError`.
      argv: its arguments.
      interrupted: what Ctrl-C leaves behind.
    """
    try:
        run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"error: interrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
