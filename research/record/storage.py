"""Files of a record: a local path, gs:// or s3://.

A path is a `pathlib.Path`, or a `UPath` that does the same on an object store. Object stores have no append and no
rename: there a file is always written as a whole, which readers see as a whole.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from upath import UPath

from research.errors import RecordError, UserError

_EXTRAS = {"gs": "gcs", "s3": "s3"}  # the object stores to which Orbax can write, and the extra that each needs


def open_path(text: str) -> Path:
    """The path that the text names.

    Raises:
      UserError: it is not local, gs:// or s3://, its package is not installed, or the text holds a password, or
        characters that the locale does not have.
    """
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character: Python could not decode the command line
        raise UserError(
            f"{text!a}: this locale is not of its characters, and libraries cannot open it: set LC_ALL=C.UTF-8, "
            "or give a name in ASCII"
        ) from None
    if "://" not in text:
        return Path(text)
    check_no_password(text)
    scheme, _, place = text.partition("://")
    if scheme == "file":
        return Path(place)
    if scheme not in _EXTRAS:
        raise UserError(f"{text}: records are on a local disk, gs:// or s3://; copy it from or to {scheme}:// yourself")
    try:
        path = UPath(text)
        _ = path.fs  # only now is the file system's package imported
    except ImportError:
        raise UserError(
            f'{text}: the package that opens {scheme}:// is not installed: pip install "meshwork[{_EXTRAS[scheme]}]"'
        ) from None
    except Exception as error:  # each file system raises its own, for want of an account, say
        raise UserError(f"{text} cannot be opened: {error}") from None
    # A UPath is no pathlib.Path to a type checker; it has the same methods.
    return cast(Path, path)


def check_no_password(text: str) -> None:
    """Raises `UserError`, which does not repeat it, where a URL holds a password: records and logs name the workdir."""
    before, at, _ = text.partition("://")[2].partition("/")[0].rpartition("@")
    if at and ":" in before:
        raise UserError(
            f"{text.partition('://')[0]}://...: a URL with a password would stand in logs and records: leave the "
            "password out, and give it by the environment or a file of its own (fsspec.json, ~/.pgpass)"
        )


def is_local(path: Path) -> bool:
    """Whether the operating system opens it: only such files can be appended to, renamed and locked."""
    return "://" not in str(path)


@contextmanager
def writing(what: Any) -> Iterator[None]:
    """Raises `RecordError` where `what` could not be written: full, read-only, out of reach."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # not OSError alone: fsspec's file systems raise their libraries' own
        raise RecordError(
            f"{what} could not be written ({_reason(error)}): the last good checkpoint is intact; fix that, and "
            "the same --workdir resumes from it"
        ) from error


def _reason(error: Exception) -> str:
    """In the operating system's words where they are known; TensorStore has its error number in the text."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def replace(path: Path, data: bytes) -> None:
    """Writes a file so that whoever reads it, at any moment, gets the old one or the new one whole.

    Raises:
      RecordError: it could not be written; the old one stays.
    """
    with writing(path):
        if is_local(path):
            new = path.with_name(f".{path.name}.new")
            try:
                new.write_bytes(data)
                os.replace(new, path)
            except OSError:
                new.unlink(missing_ok=True)  # on a full disk, half a file is in the way
                raise
        else:
            path.write_bytes(data)


class Log:
    """A file that grows. Local: every append is written at once; elsewhere: `sync` writes what was appended since.

    Args:
      path: of the file, in an existing folder.
    """

    def __init__(self, path: Path):
        self._path = path
        self._data = bytearray()  # the whole file, where it is not local
        self._synced = True

    def replace(self, data: bytes) -> None:
        """Starts it anew. Raises `RecordError` as the others do."""
        replace(self._path, data)
        self._data, self._synced = bytearray(data), True

    def append(self, data: bytes) -> None:
        """Adds to its end."""
        if not is_local(self._path):
            self._data += data
            self._synced = False
            return
        with writing(self._path), self._path.open("ab") as file:
            file.write(data)

    def sync(self) -> None:
        """Returns when all that was appended is in the file."""
        if not self._synced:
            replace(self._path, bytes(self._data))
            self._synced = True
