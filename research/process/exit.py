"""Ends a command with a one-line error and its exit code."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from research.errors import UserError, as_out_of_memory_error

_on_error: list[Callable[[int], None]] = []


def call_on_error(callback: Callable[[int], None]) -> None:
    """Registers a function that `own_exit_code` calls with the exit code when an error ends the process."""
    if callback not in _on_error:
        _on_error.append(callback)


@contextmanager
def own_exit_code() -> Iterator[None]:
    """Calls the registered functions if the block raises, and re-raises running out of memory as `OutOfMemoryError`."""
    try:
        yield
    except Exception as error:
        known = error if isinstance(error, UserError) else as_out_of_memory_error(error)
        for callback in _on_error:
            callback(known.exit_code if known else 1)
        if known is None or known is error:
            raise
        raise known from None


def exit_with(error: UserError) -> NoReturn:
    """Prints the error as one line on stderr and exits with its exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(error.exit_code)
