"""Reads prepared TFDS data sets without TensorFlow.

A prepared set is a folder `<data folder>/<name>[/<config>]/<version>` with dataset_info.json, features.json and record
files.
"""

import functools
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.data import cache, tfds_description
from research.data.cache import Arrays
from research.data.file_errors import exists, reading
from research.data.tfds_description import Description
from research.errors import UserError, as_out_of_memory_error

MOST_CLASSES = 2**20  # larger integer labels are no class numbers, and are decoded as this one
_EXAMPLES_AT_ONCE = 2000
_CACHE_VERSION = 2  # part of the cache key; raise it when decoding the same source gives different arrays
_VERSION = r"\d+\.\d+\.\d+"


class UnavailableError(UserError):
    """A data set is not available; `a|b` falls back to the next one."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(f"{name} {reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


@functools.cache
def import_tfds() -> Any:
    """Imports `tensorflow_datasets`, without its progress bars and its advice to install OpenCV."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logging.getLogger("absl").addFilter(lambda record: "tensorflow_datasets" not in record.pathname)
    return tfds


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
    """Finds a prepared set under `folder`: the version that `name` (see `split_version`) gives, else the newest.

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


def load(name: str, path: Path) -> tuple[tuple[str, ...], dict[str, Callable[[], Arrays]]]:
    """Reads the description of the prepared set in the folder `path`; its splits are read when they are called.

    Returns:
      The label names (none for text, for images without labels, and for labels that are plain integers), and a function
      for each split of the set, which decodes it unless it is cached, and returns its read-only arrays: "image" (uint8
      [n,h,w,c]) and, if the set has integer labels, "label" (int32 [n], -1: unlabeled); or "text" (uint8 [n]), the
      bytes of all examples with a newline between any two.

      The examples come in the order in which TFDS stores them. It is the same on every machine for the same files, and
      for every preparation with the same keys of the examples; unless the builder turned that off, TFDS shuffles by a
      hash of these keys, so that texts which follow each other in the source do not in the set.

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
    with reading(path):
        fingerprint = _fingerprint(path)
    splits = {}
    for split in description.splits:
        decode = functools.partial(_decode, f"{base}/{split}", path, split, description)
        entry = f"{base.replace('/', '-')}-{path.name}-{split}-{fingerprint}"
        splits[split] = functools.partial(cache.load, entry, decode)
    return description.label_names, splits


def _fingerprint(path: Path) -> str:
    """Hashes the JSON files and every file's name, size and modification time, so that a changed source is noticed."""
    digest = hashlib.sha256(str(_CACHE_VERSION).encode())
    for file in sorted(path.iterdir()):
        stat = file.stat()
        digest.update(os.fsencode(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"))
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _decode(label: str, path: Path, split: str, description: Description) -> Iterator[Arrays]:
    """Yields the split's arrays in pieces; `label` is its name in messages."""
    print(f"decoding {label} once ...", file=sys.stderr, flush=True)
    files: Sequence[Any] = ()
    try:
        builder = _builder(path)
        files = builder.info.splits[split].filepaths
        source = builder.as_data_source(split, file_format="array_record")
        if not len(source):
            raise UserError(f"{label} in {path} has no examples")
        shape = None
        for start in range(0, len(source), _EXAMPLES_AT_ONCE):
            examples = _read(source, range(start, min(start + _EXAMPLES_AT_ONCE, len(source))))
            if description.is_text:
                text = b"\n".join(example["text"] for example in examples)
                yield {"text": np.frombuffer(b"\n" + text if start else text, np.uint8)}
                continue
            shape = shape or examples[0]["image"].shape
            yield _images_and_labels(label, start, examples, shape, description)
    except UserError:
        raise
    except Exception as error:  # readers of records, protocol buffers and images each raise other types
        raise _explained(error, f"{label} in {path}", path, files) from error


def _builder(path: Path) -> Any:
    """Opens the set with TFDS, but without its label names, of which TFDS refuses some (see `tfds_description`)."""
    tfds = import_tfds()
    label = tfds.features.ClassLabel
    original = label.load_metadata
    label.load_metadata = lambda *_, **__: None
    try:
        return tfds.builder_from_directory(path)
    finally:
        label.load_metadata = original


class _ExampleError(Exception):
    """The example of this number cannot be read; the cause says why."""


def _read(source: Any, numbers: range) -> list[dict[str, Any]]:
    try:
        return source.__getitems__(numbers)
    except Exception:
        for number in numbers:
            try:
                source[number]
            except Exception as error:
                raise _ExampleError(f"example {number}") from error
        raise


def _explained(error: Exception, label: str, path: Path, files: Sequence[Any]) -> UserError:
    """Returns the error to raise: only if the files of the split can be read is it about their contents."""
    example = ""
    if isinstance(error, _ExampleError) and isinstance(error.__cause__, Exception):
        example, error = f"{error}: ", error.__cause__
    reason = f"{example}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if memory := as_out_of_memory_error(error, f"use a smaller data set than {label}, or a larger host"):
        return memory
    if isinstance(error, (ImportError, NotImplementedError)):
        return UserError(f"{label} is stored in a way that is not supported ({reason}); the data is intact")
    # The readers' errors are texts without an errno.
    for file in map(Path, files):
        with reading(file), file.open("rb") as stream:
            while stream.read(2**24):
                pass
    return UserError(f"{label} is damaged ({reason}): delete {path} and prepare it again")


def _images_and_labels(
    label: str, start: int, examples: list[dict[str, Any]], shape: tuple[int, ...], description: Description
) -> Arrays:
    num_classes = len(description.label_names)
    for i, example in enumerate(examples, start):
        image = example["image"]
        if image.dtype != np.uint8:
            raise UserError(f"{label}, example {i}: the image is {image.dtype}, not uint8")
        if image.shape != shape:
            raise UserError(
                f"{label}, example {i}: the image is {image.shape}, the first is {shape}; all need the same shape"
            )
        if num_classes and not -1 <= example["label"] < num_classes:
            raise UserError(f"{label}, example {i}: label {example['label']} is not in 0..{num_classes - 1}")
    arrays = {"image": np.stack([example["image"] for example in examples])}
    if description.has_labels:
        labels = [min(max(int(example["label"]), -1), MOST_CLASSES) for example in examples]
        arrays["label"] = np.array(labels, np.int32)
    return arrays
