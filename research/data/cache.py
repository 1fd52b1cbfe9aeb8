"""Decoded arrays, kept on disk: a data set is decoded once, and mapped into memory from then on.

An entry is a folder of `.npy` files and `entry.json`, which holds their checksums. It is written under another name and
renamed when whole, so a reader never sees half an entry, and of two processes that write the same one either may win.
Entries of sources that have changed since are not used again; the whole folder may be deleted at any time.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Arrays = dict[str, np.ndarray]

_UNFINISHED = ".unfinished-"
_DAY = 24 * 60 * 60


def folder() -> Path:
    """Where entries live: `$MESHWORK_CACHE_DIR`, else `meshwork` in the user's cache folder."""
    if given := os.environ.get("MESHWORK_CACHE_DIR"):
        return Path(given).expanduser()
    return user_folder("XDG_CACHE_HOME", ".cache") / "meshwork"


def user_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else the one of this name in the user's home.

    Where the user has none, as a container's odd one, it is in the folder of temporary files.
    """
    if given := os.environ.get(variable):
        return Path(given).expanduser()
    try:
        return Path.home() / name
    except RuntimeError:
        return Path(tempfile.gettempdir()) / name


def load(entry: str, decode: Callable[[], Iterator[Arrays]]) -> Arrays:
    """The arrays of a cache entry, made by `decode` where there is no whole entry yet.

    Args:
      entry: the entry's name: one per content, so it must change with the source.
      decode: yields consecutive pieces of the arrays: same names and dtypes, sizes that differ in the first axis only.

    Returns:
      The joined arrays by name, read-only: memory maps, or arrays in memory where the cache cannot be written, which is
      said once on stderr.
    """
    path = folder() / entry
    try:
        arrays = _read(path)
        if arrays is None:
            _write(path, decode)
            arrays = _read(path)
        if arrays is not None:
            return arrays
        reason = "what was written does not read back"
    except OSError as error:
        reason = error.strerror or str(error)
    _warn_once(f"no cache in {folder()} ({reason}): decoding at every start; MESHWORK_CACHE_DIR names another folder")
    pieces = list(decode())
    return read_only({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})


def read_only(arrays: Arrays) -> Arrays:
    """A new dictionary of the same arrays, now read-only, so that nobody who shares them can change them for others."""
    for array in arrays.values():
        array.flags.writeable = False
    return dict(arrays)


@functools.cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _read(path: Path) -> Arrays | None:
    """The entry's arrays; None where there is none. A damaged one is removed."""
    if not path.is_dir():
        return None
    try:
        expected = json.loads((path / "entry.json").read_bytes())
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in expected}
        if expected == {name: _summary(array, zlib.crc32(array.data)) for name, array in arrays.items()}:
            return arrays
    except (OSError, ValueError, EOFError, TypeError):
        pass  # not readable is one way of being damaged
    print(f"the cache entry {path} is damaged: making it anew", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=path.parent) as trash, contextlib.suppress(OSError):
        path.rename(Path(trash) / path.name)  # may fail: another process was quicker
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
        (unfinished / "entry.json").write_text(json.dumps(summaries))
        # Refused where another process has made the entry meanwhile: then that one serves.
        with contextlib.suppress(OSError):
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _ArrayWriter:
    """Appends to one `.npy` file. Plain writes, since a memory map of a full disk ends in SIGBUS, not in an OSError."""

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
        # NumPy leaves room in the header for the first axis to grow, so the final one takes no more space.
        self._file.seek(0)
        self._write_header()
        shape = [self._length, *self._empty.shape[1:]]
        return {"dtype": self._empty.dtype.str, "shape": shape, "crc32": self._checksum}


def _remove_leftovers(parent: Path) -> None:
    """Removes what killed processes left, once it is a day old: younger ones may still be at work."""
    for leftover in parent.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _DAY:
                shutil.rmtree(leftover)
