"""Reads prepared TFDS data sets without TensorFlow.

A prepared set is a folder `<data folder>/<name>[/<config>]/<version>` with dataset_info.json, features.json and record
files. The two JSON files are read here, not through TFDS, which takes most of a second to import and tries to download
a set that is missing.
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

from research.data import cache, decoding
from research.data.cache import Arrays
from research.errors import UserError

_SPLITS = ("train", "validation", "test")
_EXAMPLES_AT_ONCE = 2000
_CACHE_VERSION = 2  # part of the cache key; raise it when reading the same source gives different arrays


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
      UserError: `given` or `$TFDS_DATA_DIR` does not exist.
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
        pass  # the name is too long, there is no permission, or no such user
    raise UserError(f"{source}={name}: no such folder; create it, or set it to the folder of the data sets")


def find(name: str, folder: Path) -> Path | None:
    """Finds the newest version of the prepared set `name` (TFDS's `<set>` or `<set>/<config>`) under `folder`.

    Raises:
      UserError: the name lacks a config, and several configs are prepared.
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
        # TFDS writes to incomplete.<random>_<version> and renames it when complete.
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    }
    return versions[max(versions)] if versions else None


def load(name: str, path: Path) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Reads the prepared set in the folder `path`, decoding the splits that are not cached yet.

    Returns:
      The label names (none for text), and those of the splits "train", "validation" and "test" that the set has, each
      with "image" (uint8 [n,h,w,c]) and "label" (int32 [n]), or with "text" (uint8 [n], the bytes of all its examples
      concatenated); the arrays are read-only.

    Raises:
      UnavailableError: the set is not stored as array_record.
      UserError: the set is damaged, has neither images and labels nor text, or has images of several shapes, labels out
        of range or a split without examples.
    """
    try:
        info, features = (json.loads((path / f"{stem}.json").read_bytes()) for stem in ("dataset_info", "features"))
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
        label_names = _label_names(name, path, features.get("featuresDict", {}).get("features", {}))
        names = [split["name"] for split in info.get("splits", []) if split["name"] in _SPLITS]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: dataset_info.json or features.json cannot be read ({error}): delete the folder and prepare the "
            "data set again"
        ) from None
    if "array_record" not in formats:
        raise UnavailableError(
            name,
            f"is prepared in {path} as {formats[0]}, which only TensorFlow reads",
            f"prepare it again by `tfds build {name} --file_format=array_record --data_dir=ANOTHER_DIR` (it needs "
            "TensorFlow) and set --config.dataset.data_dir=ANOTHER_DIR",
        )
    fingerprint = _fingerprint(path)
    splits = {}
    for split in names:
        decode = functools.partial(_decode, f"{name}/{split}", path, split, len(label_names))
        splits[split] = cache.load(f"{name.replace('/', '-')}-{path.name}-{split}-{fingerprint}", decode)
    return label_names, splits


def _label_names(name: str, path: Path, features: dict[str, Any]) -> tuple[str, ...]:
    """Returns the label names, or their numbers if they are unnamed; () for a text."""
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
    """Hashes the decoder's name, the JSON files and every file's name, size and modification time.

    A changed source or decoder thus gets another cache entry.
    """
    digest = hashlib.sha256(f"{_CACHE_VERSION} {decoding.NAME}\n".encode())
    for file in sorted(path.iterdir()):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _decode(label: str, path: Path, split: str, num_classes: int) -> Iterator[Arrays]:
    """Yields the split's arrays in pieces; `label` is its name in messages, `num_classes` is 0 for text."""
    tfds = import_tfds()
    print(f"decoding {label} once ...", file=sys.stderr, flush=True)
    try:
        builder = tfds.builder_from_directory(path)
        features = {name: x for name, x in builder.info.features.items() if isinstance(x, tfds.features.Image)}
        # TFDS decodes with OpenCV where it is installed, else with Pillow, and the pixels and channels would differ.
        decoders = {name: tfds.decode.SkipDecoding() for name in features}
        source = builder.as_data_source(split, file_format="array_record", decoders=decoders)
        if not len(source):
            raise UserError(f"{label} in {path} has no examples")
        channels = _declared_channels(label, features["image"]) if num_classes else 0
        size = None
        for start in range(0, len(source), _EXAMPLES_AT_ONCE):
            examples = source.__getitems__(range(start, min(start + _EXAMPLES_AT_ONCE, len(source))))
            if not num_classes:
                yield {"text": np.frombuffer(b"".join(example["text"] for example in examples), np.uint8)}
                continue
            arrays = _images_and_labels(label, start, examples, channels, size, num_classes)
            size = arrays["image"].shape[1:3]
            yield arrays
    except UserError:
        raise
    except Exception as error:  # readers of records and protocol buffers raise other types
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{label} in {path} is damaged ({reason}): delete {path} and prepare it again") from error


def _declared_channels(label: str, feature: Any) -> int:
    # TFDS stores the bits of a float32 image as the four channels of a PNG file.
    if feature.np_dtype not in (np.uint8, np.uint16) or feature.shape[-1] not in decoding.MODES:
        raise UserError(
            f"{label}: the images are {np.dtype(feature.np_dtype)} of shape {feature.shape}; they must be uint8 or "
            "uint16 with a known number of channels"
        )
    return feature.shape[-1]


def _images_and_labels(
    label: str,
    start: int,
    examples: list[dict[str, Any]],
    channels: int,
    size: tuple[int, int] | None,
    num_classes: int,
) -> Arrays:
    """Decodes the images, which must all have the same `size` (None: that of the first); `start` numbers them."""
    images = []
    for i, example in enumerate(examples, start):
        try:
            images.append(decoding.decode(example["image"], channels, size))
        except decoding.SizeError as error:
            raise UserError(
                f"{label}, example {i}: the image {error} as the first; all need the same shape: resize them and "
                "prepare the data set again"
            ) from None
        except decoding.ImageError as error:
            raise UserError(
                f"{label}, example {i}: the image {error}; replace it and prepare the data set again"
            ) from None
        size = size or images[0].shape[:2]
        if not 0 <= example["label"] < num_classes:
            raise UserError(f"{label}, example {i}: label {example['label']} is not in 0..{num_classes - 1}")
    return {"image": np.stack(images), "label": np.array([example["label"] for example in examples], np.int32)}
