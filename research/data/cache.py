"""The cache of decoded arrays: a data set is decoded once, and memory-mapped from then on.

An entry is a folder of `.npy` files and `entry.json`, which holds their checksums. It is written under a temporary name
and renamed when complete, so readers never see a partial entry, and two processes may write the same one at once. If a
source changes, so does its entry's name; old entries stay. The whole folder may be deleted at any time.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from research.data.file_errors import is_unreadable
from research.errors import UserError

Arrays = dict[str, np.ndarray]

_UNFINISHED = ".unfinished-"
_DAY = 24 * 60 * 60


def folder() -> Path:
    """Returns the folder of the entries: `$MESHWORK_CACHE_DIR`, else `meshwork` in the user's cache folder."""
    if given := os.environ.get("MESHWORK_CACHE_DIR"):
        return Path(given).expanduser()
    return user_folder("XDG_CACHE_HOME", ".cache") / "meshwork"


def user_folder(variable: str, name: str) -> Path:
    """Returns the folder that an environment variable names, else the one called `name` in the user's home.

    A user without a home (as in some containers) gets it in the folder of temporary files.
    """
    if given := os.environ.get(variable):
        return Path(given).expanduser()
    try:
        return Path.home() / name
    except RuntimeError:
        return Path(tempfile.gettempdir()) / name


def load(entry: str, decode: Callable[[], Iterator[Arrays]], *, most_in_memory: float = math.inf) -> Arrays:
    """Returns the arrays of a cache entry; calls `decode` and writes the entry if there is none.

    Args:
      entry: the entry's name, which must change whenever the source does.
      decode: yields consecutive pieces of the arrays: same names and dtypes, sizes that differ in the first axis only.
      most_in_memory: bytes of a larger array are neither verified at every start, which reads them all, nor kept in
        memory.

    Returns:
      The concatenated arrays by name, read-only: memory maps, or arrays in memory if the cache cannot be written (with
      one warning on stderr).

    Raises:
      UserError: the cache cannot be written, and the arrays are larger than `most_in_memory`.
    """
    path = folder() / entry
    try:
        arrays = _read(path, most_in_memory)
        if arrays is None:
            _write(path, decode)
            arrays = _read(path, most_in_memory)
        if arrays is not None:
            return arrays
        reason = "the written entry cannot be read back"
    except OSError as error:
        reason = error.strerror or str(error)
    _warn_once(f"no cache in {folder()} ({reason}): decoding at every start; set MESHWORK_CACHE_DIR to another folder")
    pieces: list[Arrays] = []
    size = 0
    for piece in decode():
        pieces.append(piece)
        size += sum(array.nbytes for array in piece.values())
        if size > most_in_memory:
            raise UserError(f"{folder()} ({reason}) cannot hold {entry}: set MESHWORK_CACHE_DIR to a folder with room")
    return read_only({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})


def read_only(arrays: Arrays) -> Arrays:
    """Makes the arrays read-only, in place, and returns them in a new dictionary: safe to share between callers."""
    for array in arrays.values():
        array.flags.writeable = False
    return dict(arrays)


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a hash of the names, dtypes, shapes and contents of arrays, which does not depend on their source."""
    summaries = {name: _summary(x, zlib.crc32(np.ascontiguousarray(x).data)) for name, x in arrays.items()}
    return hashlib.sha256(json.dumps(summaries, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _read(path: Path, most_verified: float) -> Arrays | None:
    """Returns the entry's arrays, or None if there is no entry. Removes a damaged one.

    Raises:
      OSError: the entry could not be read; it is left unchanged.
    """
    if not path.is_dir():
        return None
    try:
        expected = json.loads((path / "entry.json").read_bytes())
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in expected}
        found = {
            name: _summary(array, zlib.crc32(array.data) if array.nbytes <= most_verified else expected[name]["crc32"])
            for name, array in arrays.items()
        }
        if expected == found:
            return arrays
    except (OSError, ValueError, EOFError, TypeError) as error:
        if is_unreadable(error):
            raise
    print(f"the cache entry {path} is damaged: decoding again", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=path.parent) as trash, contextlib.suppress(OSError):
        path.rename(Path(trash) / path.name)  # fails if another process has already removed it
    return None


def _summary(array: np.ndarray, checksum: int) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "crc32": checksum}


def _write(path: Path, decode: Callable[[], Iterator[Arrays]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=path.parent))
    try:
        with contextlib.ExitStack() as stack:
            writers: dict[str, _ArrayWriter] = {}
            for piece in decode():
                for name, array in piece.items():
                    if name not in writers:
                        file = stack.enter_context((unfinished / f"{name}.npy").open("wb"))
                        writers[name] = _ArrayWriter(file, array)
                    writers[name].append(array)
            summaries = {name: writer.finish() for name, writer in writers.items()}
        (unfinished / "entry.json").write_text(json.dumps(summaries), encoding="utf-8")
        # The rename fails if another process has written the entry meanwhile; that one is used then.
        with contextlib.suppress(OSError):
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _ArrayWriter:
    """Writes one `.npy` file in pieces: by plain writes, since on a full disk a memory map ends in SIGBUS."""

    def __init__(self, file: BinaryIO, like: np.ndarray):
        self._file = file
        self._empty = like[:0]
        self._length = 0
        self._checksum = 0
        self._write_header()

    def _write_header(self) -> None:
        header = np.lib.format.header_data_from_array_1_0(self._empty)
        shape = (self._length, *self._empty.shape[1:])
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": shape, "fortran_order": False})

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, self._empty.dtype)
        self._file.write(data.data)
        self._checksum = zlib.crc32(data.data, self._checksum)
        self._length += len(data)

    def finish(self) -> dict[str, Any]:
        # NumPy pads the header so that the first axis can grow: the final header overwrites the first one exactly.
        self._file.seek(0)
        self._write_header()
        shape = [self._length, *self._empty.shape[1:]]
        return {"dtype": self._empty.dtype.str, "shape": shape, "crc32": self._checksum}


def _remove_leftovers(parent: Path) -> None:
    """Removes unfinished entries that are a day old, left by killed processes; newer ones may still be written."""
    for leftover in parent.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _DAY:
                shutil.rmtree(leftover)
