"""Ends a command with an error's one line and its exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from research.errors import UserError, of_memory
from research.process import distributed


@contextmanager
def own_exit_code() -> Iterator[None]:
    """Turns an error that means out of memory into one that says so, and has this process exit with an error's code."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, UserError) else of_memory(error)
        distributed.insist(known.exit_code if known else 1)
        if known is None or known is error:
            raise
        raise known from None


def exit_with(error: UserError) -> NoReturn:
    """Ends the process with the error's one line and its exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(error.exit_code)
