"""Reads image folders: `DIR/train/CLASS/IMAGE`, `DIR/test/CLASS/IMAGE` and so on, or `DIR/CLASS/IMAGE`.

The class folders of train, sorted by their bytes, are the classes of all splits. Every image below a class folder,
nested folders included, belongs to that class.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from research.data import folder_listing, tfds_sets
from research.data.cache import Arrays
from research.data.decoding import SUFFIXES
from research.data.file_errors import is_unreadable, unreadable
from research.data.folder_listing import LAYOUT, printable
from research.data.source import DamagedError, Source, Subset, held_out
from research.errors import UserError

_TEST_FRACTION = 0.1
_MAX_NAMED = 3  # folders that a warning names
_SPLITS = {b"train": "train", b"validation": "validation", b"val": "validation", b"test": "test"}
_MISTAKEN_SPLITS = {b"training", b"testing", b"valid"}

Loaders = dict[str, Callable[[], Source]]


class FolderSource(Source):
    """The images below the class folders of a folder: "image" (bytes, the file) and "label" (int).

    Args:
      root: the absolute path of the folder.
      listing: its images, see `folder_listing.load`.
    """

    def __init__(self, root: bytes, listing: Arrays):
        self._root = root
        self._paths, self._ends = listing["paths"], listing["ends"]
        self.labels: np.ndarray = listing["labels"]
        digest = hashlib.sha256()
        for array in (self._paths, self._ends, self.labels):
            digest.update(array.data)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        path = self._path(number)
        try:
            with open(path, "rb") as file:
                return {"image": file.read(), "label": int(self.labels[number])}
        except OSError as error:
            if not is_unreadable(error):
                raise DamagedError("has been removed or replaced by a folder since the data set was listed") from None
            error.filename = None  # bytes, which would be shown as such
            raise unreadable(printable(path), error) from None

    def _path(self, number: int) -> bytes:
        start = self._ends[number - 1] if number else 0
        return os.path.join(self._root, self._paths[start : self._ends[number]].tobytes())

    def record_name(self, number: int) -> str:
        """Returns the file's path."""
        return printable(self._path(number))

    def keys(self) -> Iterable[bytes]:
        """Yields the files' paths relative to the folder of the split: `CLASS/IMAGE`."""
        return folder_listing.split(self._paths, self._ends)


def load(data_dir: str, *, hold_out: bool) -> tuple[tuple[str, ...], Loaders]:
    """Finds the classes and splits of an image folder, but does not list its images yet.

    Prints a warning about folders next to those of splits.

    Args:
      data_dir: `DIR` of the layouts above. A split exists if its folder exists; `val` is the split validation.
      hold_out: without folders of splits, whether 10% of the images become the split test: those whose path has a low
        hash, so that adding files moves no other. Otherwise all are in train.

    Returns:
      The names of the classes, and a function for each split, which lists it (see `folder_listing.load`) and prints a
      warning if that skips files.

    Raises:
      UserError: the folder is missing or unreadable or has another layout; or (when a split is loaded) a class of train
        or the whole split has no images, or train lacks a class of another split.
    """
    if not data_dir:
        raise UserError(f"--config.dataset.name=folder needs --config.dataset.data_dir=DIR: {LAYOUT}")
    top = os.path.abspath(os.fsencode(tfds_sets.data_folder(data_dir)))
    folders = _split_folders(top, folder_listing.read_folder(top).folders)
    train = folders.get("train", top)
    classes = {name: label for label, name in enumerate(_class_folders(train))}
    loaders: Loaders = {split: functools.partial(_open, folder, classes) for split, folder in folders.items()}
    loaders["train"] = functools.partial(_open_train, train, classes)
    if hold_out and not folders:
        open_parts = functools.cache(functools.partial(_open_parts, train, classes))
        loaders = {split: lambda split=split: open_parts()[split] for split in ("train", "test")}
    return tuple(map(printable, classes)), loaders


def _split_folders(top: bytes, names: Sequence[bytes]) -> dict[str, bytes]:
    """Returns the folder of each split; none if `top` has class folders instead."""
    found = [name for name in names if name in _SPLITS]
    odd = [name for name in names if name not in _SPLITS and name.lower() in _SPLITS.keys() | _MISTAKEN_SPLITS]
    if odd or (found and b"train" not in found):
        name = printable(os.path.join(top, (odd or found)[0]))
        problem = "not the name of a split" if odd else "a split, but there is no train"
        raise UserError(f"{name} is {problem}: {LAYOUT}; splits are called train, validation (or val) and test")
    if {b"val", b"validation"} <= set(found):
        raise UserError(f"{printable(top)} has both val and validation: rename or remove one of them")
    if found and (others := [name for name in names if name not in _SPLITS]):
        shown = ", ".join(map(printable, others[:_MAX_NAMED])) + (", ..." if len(others) > _MAX_NAMED else "")
        print(f"warning: {printable(top)}: skipped folders that are not splits: {shown}", file=sys.stderr)
    return {_SPLITS[name]: os.path.join(top, name) for name in found}


def _class_folders(train: bytes) -> Sequence[bytes]:
    contents = folder_listing.read_folder(train)
    folder_listing.check_classes(train, contents)
    return contents.folders


def _open(root: bytes, classes: Mapping[bytes, int]) -> FolderSource:
    listing = folder_listing.load(root, classes)
    if notes := listing["notes"].tobytes().decode():
        print(notes, file=sys.stderr)
    if not len(listing["labels"]):
        raise UserError(f"{printable(root)} has no images ({', '.join(SUFFIXES)})")
    return FolderSource(root, listing)


def _open_train(root: bytes, classes: Mapping[bytes, int]) -> FolderSource:
    source = _open(root, classes)
    counts = np.bincount(source.labels, minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts) if not count]:
        more = f" and {len(empty) - 1:,} more class folders" if len(empty) > 1 else ""
        raise UserError(
            f"{printable(os.path.join(root, empty[0]))}{more}: no images ({', '.join(SUFFIXES)}); add some, or remove "
            "the folder"
        )
    return source


def _open_parts(root: bytes, classes: Mapping[bytes, int]) -> dict[str, Source]:
    source = _open_train(root, classes)
    is_test = held_out(source.keys(), _TEST_FRACTION, b"test")
    if is_test.all() or not is_test.any():
        raise UserError(
            f"{printable(root)} has too few images ({len(source):,}) to hold out {_TEST_FRACTION:.0%} for the split "
            "test: add images, or use DIR/train/CLASS and DIR/test/CLASS"
        )
    return {"train": Subset(source, np.flatnonzero(~is_test)), "test": Subset(source, np.flatnonzero(is_test))}
