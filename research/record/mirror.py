"""Checkpoints on a file system that Orbax cannot write: a local folder, and whole copies of its steps there."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax

from research.errors import UserError
from research.record import storage


class Mirror:
    """A local folder with what `remote` holds; `push` makes `remote` hold what the folder does.

    `remote/whole.json` names the steps that are there as a whole; it is written after a new step's files and before an
    old one's go, so that a copy that was cut off is never taken for a checkpoint. All steps are copied on entry: meant
    for file systems beside gs:// and s3://, which Orbax writes itself.

    Attributes:
      folder: for Orbax.

    Raises:
      UserError: more than one process writes, which a local folder cannot serve; or what is there cannot be read.
    """

    def __init__(self, remote: Any):
        if jax.process_count() > 1:
            raise UserError(f"{remote}: several processes share local folders, gs:// and s3:// only")
        self._remote = remote
        self._index = remote / "whole.json"
        self._temporary = tempfile.TemporaryDirectory(prefix="meshwork-checkpoints-")
        self.folder = Path(self._temporary.name)
        try:
            self._names: list[str] = json.loads(self._index.read_bytes()) if self._index.exists() else []
            for name in self._names:
                remote.fs.get(f"{(remote / name).path}/", f"{self.folder / name}", recursive=True)
        except Exception as error:  # each file system raises its own
            raise UserError(
                f"{remote}: the checkpoints there cannot be read ({error}): mend it and try again"
            ) from error

    def push(self) -> None:
        """Copies new steps, and deletes those that are gone; Orbax must be writing none.

        Raises:
          RecordError: the copy failed; the steps that were there before are intact.
        """
        names = sorted(path.name for path in self.folder.iterdir())
        with storage.writing(self._remote):
            for name in set(names) - set(self._names):
                target = self._remote / name
                if target.exists():
                    self._remote.fs.rm(target.path, recursive=True)
                self._remote.fs.put(f"{self.folder / name}/", target.path, recursive=True)
            storage.replace(self._index, json.dumps(names).encode())
            for name in set(self._names) - set(names):
                self._remote.fs.rm((self._remote / name).path, recursive=True)
        self._names = names

    def close(self) -> None:
        """Deletes the local folder."""
        self._temporary.cleanup()
