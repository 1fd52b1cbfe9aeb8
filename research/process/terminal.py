"""Keeps a command running when its terminal or pipe is closed, or cannot encode a character."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


@contextlib.contextmanager
def ignore_output_errors() -> Iterator[None]:
    """Ignores output errors within the block, so that neither `| head -1` nor an unencodable character ends a run.

    Output to a closed terminal or pipe is discarded. A character that stdout cannot encode, as in an ASCII locale, is
    printed as an escape, such as \\xe4. (Python does this for stderr.)
    """
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (cast(TextIO, _ClosableStream(stream)) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # while its errors are still ignored
        sys.stdout, sys.stderr = before


class _ClosableStream:
    """A text stream that switches to the null device once it cannot be written."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  None if closed before Python started

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._discard_if_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._discard_if_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _discard_if_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # Replaces the descriptor, not the stream object: Python flushes the stream's buffer to it at exit.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
