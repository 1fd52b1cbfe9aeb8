"""Reads and writes a record's files, on a local disk, gs:// or s3://.

A path is a `pathlib.Path`, or a `UPath` with the same methods for an object store. Object stores can neither append nor
rename, but they write a file atomically, so there every write replaces the whole file.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research.errors import RecordError, UserError, brief


def is_local(path: Path) -> bool:
    """Returns whether the path is on a file system, where files can be appended to, renamed and locked."""
    return "://" not in str(path)


@contextmanager
def writing(what: Any) -> Iterator[None]:
    """Turns any error of the block except a `UserError` into a `RecordError`: `what` could not be written, and why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # not only OSError: fsspec's file systems raise their libraries' types
        raise RecordError(
            f"{what} could not be written ({_reason(error)}): the last good checkpoint is intact; once that "
            "is fixed, the same --workdir resumes from it"
        ) from error


def _reason(error: Exception) -> str:
    """Returns the operating system's message if there is one, else the error's text, shortened."""
    # TensorStore, which Orbax writes with, gives the error number only in its text.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or brief(error)


def replace(path: Path, data: bytes) -> None:
    """Writes a file atomically: a reader sees the whole old or the whole new content.

    Raises:
      RecordError: it could not be written; the old file stays.
    """
    with writing(path):
        if is_local(path):
            new = path.with_name(f".{path.name}.new")
            try:
                new.write_bytes(data)
                os.replace(new, path)
            except OSError:
                new.unlink(missing_ok=True)  # frees the space of a partial file on a full disk
                raise
        else:
            path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    """Truncates a file to `size` bytes, a local one in place, so that readers that have it open see the new end.

    Raises:
      RecordError: it could not be written.
    """
    if is_local(path):
        with writing(path):
            os.truncate(path, size)
    else:
        replace(path, path.read_bytes()[:size])


class Log:
    """A file that is appended to. A local append is written at once; on an object store, at the next `sync`.

    The methods raise `RecordError` if the file cannot be written.

    Args:
      path: the file, in an existing folder.
    """

    def __init__(self, path: Path):
        self._path = path
        self._data = bytearray()  # the whole file, if it is on an object store
        self._synced = True

    def replace(self, data: bytes) -> None:
        """Replaces the file's content."""
        replace(self._path, data)
        self._data, self._synced = bytearray(data), True

    def append(self, data: bytes) -> None:
        """Appends to the file."""
        if not is_local(self._path):
            self._data += data
            self._synced = False
            return
        with writing(self._path), self._path.open("ab") as file:
            file.write(data)

    def sync(self) -> None:
        """Returns once everything that was appended is in the file."""
        if not self._synced:
            replace(self._path, bytes(self._data))
            self._synced = True
