"""Distinguishes unreadable files from missing and damaged ones: only the latter should be replaced."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from research.errors import UserError

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def is_unreadable(error: BaseException) -> bool:
    """Returns whether the error (permission, I/O, network) says nothing about the contents of the file."""
    # Decoders raise an OSError without an errno for bad contents: gzip.BadGzipFile, PIL.UnidentifiedImageError.
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _MISSING


class UnreadableError(UserError):
    """A file cannot be read now, which says nothing about its contents.

    Attributes:
      is_transient: whether another attempt may succeed.
    """

    def __init__(self, text: str, is_transient: bool):
        super().__init__(text)
        self.is_transient = is_transient


def unreadable(path: Path | str, error: OSError) -> UnreadableError:
    """Returns the error to raise for an error for which `is_unreadable` is true."""
    return UnreadableError(
        f"{error.filename or path} could not be read ({error.strerror}); it is unchanged: fix the cause, such as its "
        "permissions or the file system, and run the same command again",
        error.errno not in (errno.EACCES, errno.EPERM),
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an `OSError` of the block, which reads `path` or a file in it, into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        if is_unreadable(error):
            raise unreadable(path, error) from None
        file = error.filename or path
        raise UserError(f"{file}: {error.strerror or error}; copy or prepare the data set again") from None


def exists(path: Path) -> bool:
    """Returns whether the path exists; unlike `Path.exists`, it behaves the same in every Python version.

    Raises:
      UserError: this cannot be determined, because of a missing permission or an I/O error.
    """
    try:
        path.stat()
    except OSError as error:
        if is_unreadable(error):
            raise unreadable(path, error) from None
        return False
    return True
