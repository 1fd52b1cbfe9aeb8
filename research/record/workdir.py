"""Creates and locks a run's workdir, and reads the files in it."""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from research.errors import UserError
from research.record.storage import is_local

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems
# Names this process: a restarted container may have the host name and the process number of the one before.
_TOKEN = secrets.token_hex(8)


def default_workdir(*names: str) -> str:
    """Returns a new folder name for a record, runs/<name>/<date-time>-<random>; every call returns another one."""
    return "/".join(["runs", *names, f"{time.strftime('%Y-%m-%d-%H%M%S')}-{secrets.token_hex(3)}"])


class Workdir:
    """A context that creates a run's workdir and locks it against a second run.

    The lock is an `flock` on `.lock`, which names the process that holds it; the operating system releases it however
    the process ends. On a file system without locks, the file `.lock-holder` replaces it while the run lasts.
    Folders that the context created are removed on exit if the run wrote no config.json.

    Object stores have no locks, so there a second run is not detected.

    Raises:
      UserError: on entry, if the folder cannot be written or another run has locked it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._created: list[Path] = []
        self._lock = -1
        self._holder: Path | None = None

    def __enter__(self) -> "Workdir":
        lock = self.path / ".lock"
        if not is_local(self.path):
            return self
        try:
            inside = (lock, self.path / "checkpoints")  # Orbax creates this one when it opens it
            self._created = [path for path in (*inside, self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            self._acquire()
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, _owner().encode(), 0)
        except BlockingIOError:
            owner = os.pread(self._lock, 200, 0).decode(errors="replace") or "another process"
            os.close(self._lock)
            advice = f", or delete {self._holder} if that process has ended" if self._holder else ""
            raise UserError(f"--workdir={self.path} is in use by {owner}: give another --workdir{advice}") from None
        except OSError as error:
            if self._lock >= 0:
                os.close(self._lock)
            if self._holder:
                self._holder.unlink(missing_ok=True)
            self._discard()
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not is_local(self.path):
            return
        if self._holder:
            self._holder.unlink(missing_ok=True)
        if not (self.path / "config.json").exists():
            self._discard()
        os.close(self._lock)

    def _acquire(self) -> None:
        """Raises `BlockingIOError` if another run has the lock."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._holder = self.path / ".lock-holder"
            if self._holder.exists() and _has_ended(self._holder.read_text(encoding="utf-8", errors="replace")):
                self._holder.unlink(missing_ok=True)
            try:
                with self._holder.open("x", encoding="utf-8") as file:
                    file.write(f"{_owner()}\n{_TOKEN}")
            except FileExistsError:
                raise BlockingIOError from None

    def _discard(self) -> None:
        for path in self._created:
            with contextlib.suppress(OSError):
                path.unlink() if path.name == ".lock" else path.rmdir()


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _has_ended(holder: str) -> bool:
    """Returns whether the lock file belongs to a process of this machine that no longer runs."""
    owner, _, token = holder.partition("\n")
    found = re.fullmatch(r"process (\d+) on (.+)", owner)
    if not found or found[2] != socket.gethostname():
        return False
    if int(found[1]) == os.getpid():
        return token != _TOKEN
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        return False
    return False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # not only OSError: fsspec's file systems raise their libraries' types
        raise UserError(f"{path} cannot be read ({error}): give another --workdir, or repair it") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if the file does not exist.

    Raises:
      UserError: it cannot be read, or is not a JSON object.
    """
    with _reading(path):
        try:
            value = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object, as a run writes it: give another --workdir, or repair it")
    return value


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without an unfinished last one.

    Raises:
      UserError: it cannot be read.
    """
    path = workdir / "metrics.jsonl"
    with _reading(path):
        return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
