"""TFDS sets that are prepared on this machine, read without TensorFlow.

A prepared set is a folder `<data folder>/<name>[/<config>]/<version>` with dataset_info.json, features.json and record
files. The two JSON files are read here, not through TFDS: TFDS takes most of a second to import, and where a set is
absent it tries to download it.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from research.data import cache
from research.data.cache import Arrays
from research.errors import UserError

_SPLITS = ("train", "validation", "test")
_EXAMPLES_AT_ONCE = 2000
_CACHE_LAYOUT = 1  # part of the key; to be raised when what is made of the same source changes


class UnavailableError(UserError):
    """A data set is not here and cannot be had; another may serve instead."""

    def __init__(self, name: str, reason: str, remedy: str):
        super().__init__(f"{name} {reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


@functools.cache
def import_tfds() -> Any:
    """The module `tensorflow_datasets`, without its progress bars and its advice to install OpenCV."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logging.getLogger("absl").addFilter(lambda record: "tensorflow_datasets" not in record.pathname)
    return tfds


def data_folder(given: str) -> Path:
    """The folder of prepared sets: `given`, else `$TFDS_DATA_DIR`, else TFDS's default (which need not exist).

    Raises:
      UserError: one that was named does not exist.
    """
    source, name = "--config.dataset.data_dir", given
    if not given:
        source, name = "TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", "")
    if not name:
        return cache.user_folder("TFDS_DATA_DIR", "tensorflow_datasets")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError):
        pass  # too long a name, no permission, no such user
    raise UserError(f"{source}={name}: no such folder; create it, or name the one that holds the data sets")


def find(name: str, folder: Path) -> Path | None:
    """The newest version of the prepared set `name` (TFDS's `<set>` or `<set>/<config>`) under `folder`.

    Raises:
      UserError: only configs of this name are there, and more than one of them.
    """
    try:
        if (newest := _newest_version(folder / name)) is not None:
            return newest
        configs = sorted(p for p in (folder / name).glob("*") if _newest_version(p) is not None)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None
    if len(configs) > 1:
        choices = ", ".join(f"{name}/{p.name}" for p in configs)
        raise UserError(f"--config.dataset.name={name}: several configs are prepared in {folder}; use one of {choices}")
    return _newest_version(configs[0]) if configs else None


def _newest_version(folder: Path) -> Path | None:
    versions = {
        tuple(map(int, path.name.split("."))): path
        for path in folder.glob("*")
        # TFDS writes to incomplete.<random>_<version> and renames it when whole.
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    }
    return versions[max(versions)] if versions else None


def load(name: str, path: Path) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Reads the prepared set in the folder `path`, decoding what the cache does not hold.

    Returns:
      The label names (none for text), and those of the splits "train", "validation" and "test" that the set has, each
      with "image" (uint8 [n,h,w,c]) and "label" (int32 [n]), or with "text" (uint8 [n], the bytes of all its examples).

    Raises:
      UnavailableError: it is not stored as array_record.
      UserError: it is damaged, or has neither image and label nor text, images of several shapes, labels out of range
        or a split without examples.
    """
    try:
        info, features = (json.loads((path / f"{stem}.json").read_bytes()) for stem in ("dataset_info", "features"))
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
        label_names = _label_names(name, path, features.get("featuresDict", {}).get("features", {}))
        names = [split["name"] for split in info.get("splits", []) if split["name"] in _SPLITS]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: dataset_info.json or features.json cannot be read ({error}): delete the folder and prepare the "
            "data set anew"
        ) from None
    if "array_record" not in formats:
        raise UnavailableError(
            name,
            f"is prepared in {path} as {formats[0]}, which only TensorFlow reads",
            f"`tfds build {name} --file_format=array_record --data_dir=ANOTHER_DIR` (it needs TensorFlow) prepares it "
            "anew, and --config.dataset.data_dir=ANOTHER_DIR uses that",
        )
    fingerprint = _fingerprint(path)
    splits = {}
    for split in names:
        decode = functools.partial(_decode, f"{name}/{split}", path, split, len(label_names))
        splits[split] = cache.load(f"{name.replace('/', '-')}-{path.name}-{split}-{fingerprint}", decode)
    return label_names, splits


def _label_names(name: str, path: Path, features: dict[str, Any]) -> tuple[str, ...]:
    """The label names, by number where they have none; () for a text."""
    if "image" in features.get("image", {}) and "classLabel" in features.get("label", {}):
        file = path / "label.labels.txt"
        if file.is_file():
            return tuple(line for line in file.read_text().splitlines() if line.strip())
        return tuple(str(i) for i in range(int(features["label"]["classLabel"]["numClasses"])))
    if "text" in features.get("text", {}):
        return ()
    found = ", ".join(features) or "none"
    raise UserError(f"{name}: a data set needs the features image and label, or text; {path} has {found}")


def _fingerprint(path: Path) -> str:
    """Changes when the source does: a hash of its JSON files, and of every file's name, size and time."""
    digest = hashlib.sha256(str(_CACHE_LAYOUT).encode())
    for file in sorted(path.iterdir()):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _decode(label: str, path: Path, split: str, num_classes: int) -> Iterator[Arrays]:
    """Yields the split's arrays in pieces; `label` names it in messages, `num_classes` is 0 for text."""
    tfds = import_tfds()
    print(f"decoding {label} once ...", file=sys.stderr, flush=True)
    try:
        source = tfds.builder_from_directory(path).as_data_source(split, file_format="array_record")
        if not len(source):
            raise UserError(f"{label} in {path} has no examples")
        shape = None
        for start in range(0, len(source), _EXAMPLES_AT_ONCE):
            examples = source.__getitems__(range(start, min(start + _EXAMPLES_AT_ONCE, len(source))))
            if not num_classes:
                yield {"text": np.frombuffer(b"".join(example["text"] for example in examples), np.uint8)}
                continue
            shape = shape or examples[0]["image"].shape
            yield _images_and_labels(label, start, examples, shape, num_classes)
    except UserError:
        raise
    except Exception as error:  # the readers of records, protocol buffers and images each have errors of their own
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{label} in {path} is damaged ({reason}): delete {path} and prepare it anew") from error


def _images_and_labels(
    label: str, start: int, examples: list[dict[str, Any]], shape: tuple[int, ...], num_classes: int
) -> Arrays:
    for i, example in enumerate(examples, start):
        image = example["image"]
        if image.dtype != np.uint8:
            raise UserError(f"{label}, example {i}: the image is {image.dtype}, not uint8")
        if image.shape != shape:
            raise UserError(
                f"{label}, example {i}: the image is {image.shape}, the first is {shape}; all need one shape"
            )
        if not 0 <= example["label"] < num_classes:
            raise UserError(f"{label}, example {i}: label {example['label']} is not in 0..{num_classes - 1}")
    return {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }
