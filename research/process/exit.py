"""Ends a command with a one-line error and its exit code (the codes are listed in `research.errors`)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from research.errors import UserError, as_out_of_memory_error
from research.process import distributed


@contextmanager
def own_exit_code() -> Iterator[None]:
    """Makes an error in the block, including out of memory, end the process with its own exit code."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, UserError) else as_out_of_memory_error(error)
        distributed.force_exit_code(known.exit_code if known else 1)
        if known is None or known is error:
            raise
        raise known from None


def exit_with(error: UserError) -> NoReturn:
    """Prints the error as one line on stderr and exits with its exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(error.exit_code)
