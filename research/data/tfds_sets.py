"""Reads prepared TFDS data sets without TensorFlow.

A prepared set is a folder `<data folder>/<name>[/<config>]/<version>` with dataset_info.json, features.json and record
files.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from research.data import cache, decoding, tfds_description, tfds_records
from research.data.cache import Arrays
from research.data.file_errors import exists, reading
from research.data.source import Source
from research.data.text_source import WHOLE, Part, Text
from research.errors import UserError

_CACHE_VERSION = 2  # part of the cache key; raise it when the same source is read to different arrays
_VERSION = r"\d+\.\d+\.\d+"


class UnavailableError(UserError):
    """A data set is not available; `a|b` falls back to the next one."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(f"{name} {reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


def data_folder(given: str) -> Path:
    """Returns the folder of prepared sets: `given`, else `$TFDS_DATA_DIR`, else TFDS's default (which may not exist).

    Raises:
      UserError: `given` or `$TFDS_DATA_DIR` does not exist or is not readable.
    """
    source, name = "--config.dataset.data_dir", given
    if not given:
        source, name = "TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", "")
    if not name:
        return cache.user_folder("TFDS_DATA_DIR", "tensorflow_datasets")
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # no such user
        path = Path(name)
    if exists(path) and path.is_dir():
        return path
    raise UserError(f"{source}={name}: no such folder; create it, or set it to the folder of the data sets")


def split_version(name: str) -> tuple[str, str]:
    """Splits TFDS's `<set>[/<config>][:<version>]` into the name and the version ("": any).

    Raises:
      UserError: the version is not of the form 1.2.3.
    """
    base, colon, version = name.partition(":")
    if colon and not (base and re.fullmatch(_VERSION, version)):
        raise UserError(f"--config.dataset.name={name}: a version has three numbers, as in {base or 'mnist'}:3.0.1")
    return base, version


def find(name: str, folder: Path) -> Path | None:
    """Finds a prepared set under `folder`: the version in `name` (see `split_version`), else the newest.

    Returns:
      The folder of that version, or None if the set is not prepared in any version.

    Raises:
      UnavailableError: the set is prepared in other versions only.
      UserError: a folder is not readable, or the name lacks a config and several configs are prepared.
    """
    base, version = split_version(name)
    if not (versions := _versions(folder / base)):
        configs = [p for p in _subfolders(folder / base) if _versions(p)]
        if len(configs) > 1:
            choices = ", ".join(name.replace(base, f"{base}/{p.name}", 1) for p in configs)
            raise UserError(
                f"--config.dataset.name={name}: several configs are prepared in {folder}; use one of {choices}"
            )
        versions = _versions(configs[0]) if configs else {}
    if not versions:
        return None
    if not version:
        return versions[max(versions)]
    if (numbers := tuple(map(int, version.split(".")))) in versions:
        return versions[numbers]
    present = ", ".join(f"{base}:{versions[key].name}" for key in sorted(versions))
    remedy = f"prepare it by `tfds build {name} --file_format=array_record --data_dir={folder}` (it needs TensorFlow)"
    raise UnavailableError(name, f"is not prepared in {folder}, which has {present}", f"use one of these, or {remedy}")


def _subfolders(folder: Path) -> list[Path]:
    if not exists(folder) or not folder.is_dir():
        return []
    with reading(folder):
        return sorted(path for path in folder.iterdir() if exists(path) and path.is_dir())


def _versions(folder: Path) -> dict[tuple[int, ...], Path]:
    return {
        tuple(map(int, path.name.split("."))): path
        for path in _subfolders(folder)
        # TFDS writes to incomplete.<random>_<version> and renames it when complete.
        if re.fullmatch(_VERSION, path.name) and exists(path / "dataset_info.json")
    }


def load(
    name: str, path: Path, *, as_records: bool = False
) -> tuple[tuple[str, ...], dict[str, "Callable[[], Arrays | Source] | RecordText"]]:
    """Reads the description of the prepared set in the folder `path`, but not yet its splits.

    Returns:
      The label names (none for text, for images without labels, and for labels that are plain integers), and for each
      split of the set a text, or a function, which decodes it unless it is cached, and returns its read-only arrays:
      "image" (uint8 [n,h,w,c]) and, if the set has integer labels, "label" (int32 [n], -1: unlabeled). With
      `as_records`, splits of images are not decoded: the function returns a source of their records.

      The examples have the order in which TFDS stores them. It depends only on their keys, not on the machine: unless
      the builder turned that off, TFDS shuffles by a hash of the keys, so texts that are adjacent in the source are not
      adjacent in the set.

    Raises:
      UnavailableError: the set is not stored as array_record.
      UserError: the set is damaged or not readable, has neither images nor text, or (when a split is read) has images
        of several shapes, labels out of range or no examples.
    """
    base, _ = split_version(name)
    description = tfds_description.read(base, path)
    if "array_record" not in description.formats:
        raise UnavailableError(
            name,
            f"is prepared in {path} as {description.formats[0]}, which only TensorFlow reads",
            f"prepare it again by `tfds build {name} --file_format=array_record --data_dir=ANOTHER_DIR` (it needs "
            "TensorFlow) and set --config.dataset.data_dir=ANOTHER_DIR",
        )
    if as_records and not description.is_text:
        source = functools.partial(tfds_records.TfdsSource, base, path, description)
        return description.label_names, {split: functools.partial(source, split) for split in description.splits}
    with reading(path):
        fingerprint = _fingerprint(path)
    splits = {}
    for split in description.splits:
        decode = functools.partial(tfds_records.decode, f"{base}/{split}", path, split, description)
        entry = f"{base.replace('/', '-')}-{path.name}-{split}-{fingerprint}"
        if description.is_text:
            splits[split] = RecordText(f"{base}/{split}", entry, decode)
        else:
            splits[split] = functools.partial(cache.load, entry, decode)
    return description.label_names, splits


class RecordText(Text):
    """The text of a split: its examples, with a newline between any two.

    Args:
      name: names it in messages.
      entry: part of a file name, which changes whenever the split does.
      decode: `decode(part=...)` yields the bytes of a part in pieces, {"text": uint8 [n]}.
      part: which part of the whole text, in whole examples.
    """

    def __init__(self, name: str, entry: str, decode: Callable[..., Iterator[Arrays]], part: Part = WHOLE):
        self.name, self.key = name, entry if part == WHOLE else f"{entry}-{part[0]}-{part[1]}"
        self._entry, self._decode, self._part = entry, decode, part

    def blocks(self, *, is_utf8: bool) -> Iterator[bytes]:
        """Yields the text of some thousand examples each."""
        del is_utf8  # checked where it is decoded
        for piece in self._decode(part=self._part):
            yield piece["text"].tobytes()

    def part(self, part: Part) -> "RecordText":
        """Returns a part of the whole text."""
        return RecordText(self.name, self._entry, self._decode, part)


def _fingerprint(path: Path) -> str:
    """Hashes the decoder's name, the JSON files and every file's name, size and modification time.

    A changed source or decoder thus gets another cache entry.
    """
    digest = hashlib.sha256(f"{_CACHE_VERSION} {decoding.NAME}\n".encode())
    for file in sorted(path.iterdir()):
        stat = file.stat()
        digest.update(os.fsencode(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"))
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
