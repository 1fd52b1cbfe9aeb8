"""Lists the images below the class folders of a folder, and caches the listing.

Paths are bytes, as the file system has them: names need not be UTF-8. The order depends on the names only: the images
of a folder, then its subfolders, both sorted by their bytes. Links are followed; one that leads back to a folder on its
own path is skipped. Hidden files and folders are ignored.

A cached listing is used as long as every folder that was visited is unchanged, by its modification time, change time
(which also changes if a copying program sets the modification time) and inode number. Images are not looked at.
"""

import array
import collections
import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from research.data import cache
from research.data.cache import Arrays
from research.data.decoding import IGNORED_FOLDERS, SUFFIXES
from research.data.file_errors import is_unreadable, unreadable
from research.errors import UserError

LAYOUT = "expected DIR/train/CLASS/IMAGE, DIR/test/CLASS/IMAGE and so on, or DIR/CLASS/IMAGE"

_RULES = 1  # part of the cache key; raise it when the same folder is listed differently
_SUFFIXES = frozenset(map(os.fsencode, SUFFIXES))
_IGNORED = frozenset(map(os.fsencode, IGNORED_FOLDERS))
_UNSETTLED = 2 * 10**9  # nanoseconds; the coarsest timestamps in use (FAT) are those of even seconds
_WEEK = 7 * 24 * 60 * 60
_OTHER, _BROKEN, _LOOP, _OUTSIDE = "files of other types", "broken links", "links into a loop", "images in no class"


def printable(path: bytes) -> str:
    """Returns a path or name for messages, on one line, with U+FFFD for what is not UTF-8."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "\N{REPLACEMENT CHARACTER}", path.decode("utf-8", "replace"))


@dataclasses.dataclass
class Contents:
    """The contents of a folder, by name; hidden entries excluded.

    Attributes:
      images: files with a suffix of `decoding.SUFFIXES`, sorted.
      folders: subfolders, and links to folders, sorted.
      skipped: the number of other entries of each kind.
    """

    images: list[bytes] = dataclasses.field(default_factory=list)
    folders: list[bytes] = dataclasses.field(default_factory=list)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def read_folder(path: bytes) -> Contents:
    """Reads a folder, without a call of stat for each file (if the file system tells their types).

    Raises:
      UserError: it cannot be read.
    """
    contents = Contents()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.name.startswith(b".") and entry.name not in _IGNORED:
                    _add(contents, entry)
    except OSError as error:
        _refuse(path, error)
    contents.images.sort()
    contents.folders.sort()
    return contents


def _add(contents: Contents, entry: os.DirEntry[bytes]) -> None:
    name = entry.name
    try:
        if entry.is_dir():
            contents.folders.append(name)
        elif name[name.rfind(b".") :].lower() not in _SUFFIXES:
            contents.skipped[_OTHER] += 1
        elif entry.is_file():
            contents.images.append(name)
        else:  # not a pipe or device either: reading it might never end
            contents.skipped[_BROKEN if entry.is_symlink() else _OTHER] += 1
    except OSError as error:
        if is_unreadable(error) and error.errno != errno.ELOOP:
            _refuse(entry.path, error)
        contents.skipped[_BROKEN] += 1


def _refuse(path: bytes, error: OSError) -> NoReturn:
    error.filename = None  # bytes, which would be shown as such
    if is_unreadable(error):
        raise unreadable(printable(path), error) from None
    raise UserError(f"{printable(path)} could not be listed ({error.strerror}): run again when it no longer changes")


def check_classes(path: bytes, contents: Contents) -> None:
    """Raises `UserError` if the folder with these contents, which should have class folders, has none."""
    if not contents.folders:
        problem = "has images, but no class folders" if contents.images else "has no class folders"
        raise UserError(f"{printable(path)} {problem}: {LAYOUT}")


def load(root: bytes, classes: Mapping[bytes, int]) -> Arrays:
    """Lists the images below `root`, or reads the cached listing if no folder has changed since.

    Args:
      root: the absolute path of a folder of class folders.
      classes: the label of each class folder.

    Returns:
      "paths" (uint8 [bytes]), the images' paths relative to `root`, one after another; "ends" (int64 [n]), where each
      of them ends; "labels" (int32 [n]); "folders", "folder_ends": the same for the visited folders (m); "stamps"
      (int64 [m, 3]): their state; "notes" (uint8): a line in UTF-8 about what was skipped. Read-only.

    Raises:
      UserError: there are no class folders, a class folder is not in `classes`, or a folder cannot be read.
    """
    # Several versions of a folder may have entries: hosts with a copy each may share a cache.
    of_path = f"folder-{_hash(root)}-"
    of_classes = f"{of_path}{_hash(repr((_RULES, SUFFIXES, sorted(classes.items()))).encode())}-"
    for path in _entries(of_classes):
        with contextlib.suppress(_NoEntryError):
            listing = cache.load(path.name, _no_entry)
            if _is_current(root, listing):
                with contextlib.suppress(OSError):
                    os.utime(path)
                return listing
    listing = scan(root, classes)
    # A folder that is still changing may change again without another timestamp.
    if (listing["stamps"] != -1).all():
        name = of_classes + _hash(listing["folders"].tobytes() + listing["stamps"].tobytes())
        listing = cache.load(name, lambda listing=listing: iter([listing]))
    _remove_old(of_path)
    return cache.read_only(listing)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


class _NoEntryError(Exception):
    """The cache entry was damaged."""


def _no_entry() -> Iterator[Arrays]:
    raise _NoEntryError


def _entries(prefix: str) -> list[Path]:
    """Returns the cache entries with this prefix, those used last first."""
    found = []
    with contextlib.suppress(OSError):  # removed by another process
        found.extend((path.stat().st_mtime, path) for path in cache.folder().glob(f"{prefix}*"))
    return [path for _, path in sorted(found, reverse=True)]


def _remove_old(prefix: str) -> None:
    """Removes entries with which no run has started for a week.

    Not earlier: a file that a process on another host has mapped must stay on a network file system.
    """
    for path in _entries(prefix):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _WEEK:
                shutil.rmtree(path)


def _is_current(root: bytes, listing: Arrays) -> bool:
    for folder, stamp in zip(split(listing["folders"], listing["folder_ends"]), listing["stamps"].tolist()):
        try:
            if _stamp(os.stat(os.path.join(root, folder))) != stamp:
                return False
        except OSError:
            return False
    return True


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino & (2**63 - 1)]


def split(joined: np.ndarray, ends: np.ndarray) -> Iterator[bytes]:
    """Yields the paths of a listing one by one."""
    view, start = joined.data, 0
    for end in ends:
        yield bytes(view[start:end])
        start = end


class _Paths:
    """Paths, one after another in one buffer: a list of them would take three times the memory."""

    def __init__(self):
        self.joined, self.ends = bytearray(), array.array("q")

    def append(self, folder: bytes, name: bytes) -> None:
        if folder:
            self.joined += folder
            self.joined += b"/"
        self.joined += name
        self.ends.append(len(self.joined))


def scan(root: bytes, classes: Mapping[bytes, int]) -> Arrays:
    """Lists the images below `root`; see `load`. The stamps of folders that have just changed are -1."""
    images, folders = _Paths(), _Paths()
    labels, stamps = array.array("i"), array.array("q")
    skipped: collections.Counter[str] = collections.Counter()
    # Not recursive: folders may be nested more deeply than Python's calls. The ancestors are device and inode numbers.
    pending: list[tuple[bytes, int, tuple[tuple[int, int], ...]]] = [(b"", -1, ())]
    while pending:
        folder, label, ancestors = pending.pop()
        path = os.path.join(root, folder) if folder else root
        # Before it is read, so that a later change changes the stamp.
        identity, stamp = _examine(path)
        if identity in ancestors:
            skipped[_LOOP] += 1
            continue
        contents = read_folder(path)
        folders.append(b"", folder)
        stamps.extend(stamp)
        skipped += contents.skipped
        if not folder:
            _check_root(root, contents, classes)
            skipped[_OUTSIDE] += len(contents.images)
            contents.images.clear()
        for name in contents.images:
            images.append(folder, name)
        labels.extend([label] * len(contents.images))
        for name in reversed(contents.folders):
            below = folder + b"/" + name if folder else name
            pending.append((below, label if folder else classes[name], (*ancestors, identity)))
    return {
        "paths": np.frombuffer(images.joined, np.uint8),
        "ends": np.frombuffer(images.ends, np.int64),
        "labels": np.frombuffer(labels, np.int32),
        "folders": np.frombuffer(folders.joined, np.uint8),
        "folder_ends": np.frombuffer(folders.ends, np.int64),
        "stamps": np.frombuffer(stamps, np.int64).reshape(-1, 3),
        "notes": np.frombuffer(_notes(root, skipped).encode(), np.uint8),
    }


def _examine(path: bytes) -> tuple[tuple[int, int], list[int]]:
    """Returns a folder's device and inode numbers, and its stamp."""
    try:
        stat = os.stat(path)
    except OSError as error:
        _refuse(path, error)
    now = time.time_ns()
    settled = all(abs(now - changed) > _UNSETTLED for changed in (stat.st_mtime_ns, stat.st_ctime_ns))
    return (stat.st_dev, stat.st_ino), _stamp(stat) if settled else [-1, -1, -1]


def _check_root(root: bytes, contents: Contents, classes: Mapping[bytes, int]) -> None:
    check_classes(root, contents)
    if unknown := [name for name in contents.folders if name not in classes]:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        advice = "rename or remove it, or add the class to train"
        if _normalized(unknown[0]) in map(_normalized, classes):
            advice = "it has one that looks the same but differs in Unicode normalization: rename this folder to match"
        raise UserError(
            f"{printable(os.path.join(root, unknown[0]))}{more}: train has no class folder of this name; {advice}"
        )


def _normalized(name: bytes) -> str:
    return unicodedata.normalize("NFC", os.fsdecode(name))


def _notes(root: bytes, skipped: Mapping[str, int]) -> str:
    counts = ", ".join(f"{kind} ({number:,})" for kind, number in sorted(skipped.items()) if number)
    return f"warning: {printable(root)}: skipped {counts}" if counts else ""
