"""Reads the description of a prepared TFDS data set: dataset_info.json, features.json and label.labels.txt.

The files are read here, not through TFDS, which takes most of a second to import and tries to download a set that is
missing. TFDS also reads label names in the locale's encoding and skips blank ones, so that it rejects some sets that it
has written itself.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from research.data.file_errors import exists, reading
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of a prepared set.

    Attributes:
      formats: the formats of its record files, as in "array_record".
      splits: the names of its splits.
      is_text: whether the examples are texts; otherwise they are images.
      has_labels: whether the images have integer labels.
      label_names: the name of each class, by label; () if there are no labels, or integers without a number of classes.
    """

    formats: tuple[str, ...]
    splits: tuple[str, ...]
    is_text: bool
    has_labels: bool
    label_names: tuple[str, ...]


def read(name: str, path: Path) -> Description:
    """Reads the description of the prepared set `name` in the folder `path`.

    Raises:
      UserError: a file is damaged, missing or unreadable, or the examples are neither images of 8 or 16 bits nor texts.
    """
    with reading(path):
        contents = [(path / f"{stem}.json").read_bytes() for stem in ("dataset_info", "features")]
    try:
        info, features = (json.loads(content) for content in contents)
        formats = (info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", []))
        splits = tuple(split["name"] for split in info.get("splits", []))
        features = features.get("featuresDict", {}).get("features", {})
        return Description(formats, splits, *_features(name, path, features))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: dataset_info.json or features.json is damaged ({error}): delete the folder and prepare the data "
            "set again"
        ) from None


def _features(name: str, path: Path, features: dict[str, Any]) -> tuple[bool, bool, tuple[str, ...]]:
    """Returns `is_text`, `has_labels` and `label_names`."""
    if "image" in features.get("image", {}):
        # TFDS stores the bits of a float32 image as the four channels of a PNG file.
        if (dtype := features["image"]["image"].get("dtype", "uint8")) not in ("uint8", "uint16"):
            raise UserError(f"{name}: its images are {dtype}; only images of uint8 and uint16 are supported")
        label = features.get("label", {})
        if "classLabel" in label:
            return False, True, _label_names(path / "label.labels.txt", int(label["classLabel"]["numClasses"]))
        return False, _is_integer(label.get("tensor", {})), ()
    if "text" in features.get("text", {}):
        return True, False, ()
    found = ", ".join(features) or "none"
    raise UserError(f"{name}: a data set needs a feature image or text; {path} has {found}")


def _is_integer(tensor: dict[str, Any]) -> bool:
    return not tensor.get("shape", {"dimensions": []}) and "int" in tensor["dtype"]


def _label_names(file: Path, num_classes: int) -> tuple[str, ...]:
    """Reads one name per line; if there is no file, the names are the numbers of the classes."""
    if not exists(file):
        return tuple(map(str, range(num_classes)))
    with reading(file):
        content = file.read_bytes()
    try:
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8 ({error.reason} at byte {error.start}): convert it to UTF-8") from None
    if len(lines) != num_classes:
        raise UserError(f"{file} has {len(lines)} lines, but the set has {num_classes} classes: each needs one line")
    return tuple(line.removesuffix("\r") for line in lines)
