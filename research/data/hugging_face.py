"""Reads data sets of Hugging Face `datasets` from folders, Parquet files and the local cache, without a network."""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from research.data.file_errors import is_unreadable, unreadable
from research.data.hugging_face_files import open_splits, quiet_and_offline, reading
from research.data.hugging_face_text import ColumnText, is_string, is_text
from research.data.source import DamagedError, Source
from research.data.tfds_records import MOST_CLASSES
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

# `datasets` is imported within functions: it is an extra, and takes seconds to import.
if TYPE_CHECKING:
    import datasets

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


def load(name: str, data_dir: str) -> tuple[tuple[str, ...], Mapping[str, Callable[[], Source] | ColumnText], str]:
    """Opens a data set of images or texts, without reading its examples.

    Args:
      name: one of these, without the prefix "hf:"; what exists as a file or folder is not looked up in the cache.
        - A folder that `save_to_disk` wrote. A single `Dataset` becomes the split "train".
        - A folder of data files as on the Hub. Their names, or the README.md, tell the splits: train.parquet,
          data/train-00000-of-00002.parquet. If the README.md has several configs: FOLDER/CONFIG.
        - A Parquet file, which becomes the split "train", or a glob pattern of such files.
        - OWNER/NAME or OWNER/NAME/CONFIG, a data set of the Hub that `datasets.load_dataset` or `hf download` has
          stored in the local cache; of several revisions, the one that was stored last.
      data_dir: the folder that relative paths start from, and the cache (the `cache_dir` of `load_dataset`); "": the
        working directory, and the cache that `datasets` uses by default.

    Returns:
      - The label names, () of texts. A column `label` without names may hold integers, named "0" to the largest in
        train, or strings, numbered in alphabetical order.
      - For each split its text, if it has a column `text` of strings and no images, or a function, which opens it, or
        raises a `UserError` if it is damaged, has no image column, or has other labels than train.
      - The revision, if the set comes from the Hub, else "".

    Data files are converted to Arrow files in the default cache once, with a line on stderr.

    Raises:
      UnavailableError: `datasets` is not installed, or the data set is not in the cache.
      UserError: no such file or folder, not a data set, damaged or unreadable files, no config was chosen among
        several, or no image or label column can be chosen.
    """
    if "datasets" not in sys.modules:
        # The import logs the versions of JAX and PyTorch before it sets the level.
        logging.getLogger("datasets").setLevel(logging.WARNING)
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UnavailableError(
            f"hf:{name}", "needs Hugging Face datasets", "install it with pip install -e '.[hf]'"
        ) from None
    with quiet_and_offline(), reading(name):
        splits, revision = open_splits(name, data_dir)
        reference = "train" if "train" in splits else next(iter(splits))
        is_image = not is_text(splits[reference].features)
        label_names = _label_names(f"{name}/{reference}", splits[reference]) if is_image else ()
        loaders = {
            split: ColumnText(f"{name}/{split}", dataset)
            if is_text(dataset.features)
            else partial(_open_split, f"{name}/{split}", dataset, label_names, reference)
            for split, dataset in splits.items()
        }
    return label_names, loaders, revision


def _choose_column(name: str, features: Mapping[str, Any], kind: type, preferred: tuple[str, ...]) -> str | None:
    """Returns the column of a type, the first of the `preferred` names if there are several, or None."""
    columns = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(columns) < 2:
        return columns[0] if columns else None
    for column in preferred:
        if column in columns:
            return column
    raise UserError(
        f"hf:{name} has several columns of type {kind.__name__}: {', '.join(columns)}; rename one of them to "
        f"{preferred[0]} with `rename_column` of `datasets`"
    )


def _image_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    column = _choose_column(name, features, datasets.Image, _IMAGE_COLUMNS)
    if column is None:
        found = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
        raise UserError(
            f"hf:{name} has no column of type Image and no text, only {found or 'no columns'}; mark the column of "
            "encoded images with `cast_column(COLUMN, datasets.Image())`, or rename that of texts to text with "
            "`rename_column`, and save the data set again"
        )
    return column


def _type_name(feature: Any) -> str:
    return getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else type(feature).__name__


def _label_column(name: str, features: Mapping[str, Any]) -> str | None:
    import datasets

    column = _choose_column(name, features, datasets.ClassLabel, _LABEL_COLUMNS)
    label = features.get("label")
    if column is None and (is_string(label) or re.fullmatch(r"u?int\d+", getattr(label, "dtype", None) or "")):
        return "label"
    return column


def _label_names(name: str, dataset: "datasets.Dataset") -> tuple[str, ...]:
    """Returns the names of the label column; () if there is none, or if its values are too many to be classes."""
    column = _label_column(name, dataset.features)
    if column is None:
        return ()
    names = getattr(dataset.features[column], "names", None)
    if names is None and is_string(dataset.features[column]):
        names = sorted(filter(None, dataset.data.column(column).unique().to_pylist()))
    elif names is None:
        names = range(_labels(name, dataset, column).max(initial=-1) + 1)
    return tuple(map(str, names)) if len(names) <= MOST_CLASSES else ()


def _labels(name: str, dataset: "datasets.Dataset", column: str, label_names: tuple[str, ...] = ()) -> np.ndarray:
    """Returns int64 [n], -1: unlabeled. Only the pages of this column are read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = dataset.data.column(column)
    if not is_string(dataset.features[column]):
        return np.maximum(values.cast("int64").fill_null(-1).to_numpy(), -1)

    def find(labels: Sequence[str | None]) -> Any:
        return pc.call_function("index_in", [values], pc.SetLookupOptions(value_set=pa.array(labels, values.type)))

    numbers = find(label_names).fill_null(-1).to_numpy()
    unknown = np.flatnonzero((numbers < 0) & find([None, ""]).is_null().to_numpy())
    if unknown.size:
        label = values[int(unknown[0])].as_py()
        raise UserError(f"hf:{name} has the label {label!r}, which is none of the {len(label_names)} classes")
    return numbers.astype(np.int64)


def _open_split(name: str, dataset: "datasets.Dataset", label_names: tuple[str, ...], reference: str) -> Source:
    with reading(name):
        return _Examples(name, dataset, label_names, reference)


class _Examples(Source):
    """The examples of a split, read from memory-mapped Arrow files."""

    def __init__(self, name: str, dataset: "datasets.Dataset", label_names: tuple[str, ...], reference: str):
        self._name = name
        images = dataset.data.column(_image_column(name, dataset.features))
        # Offsets that point outside of the file would crash the process. This does not read the images.
        images.validate(full=True)
        # `dataset[number]` would take ten times as long: 70 microseconds.
        fields = dict(zip((field.name for field in images.type), images.flatten()))
        self._contents, self._paths = fields["bytes"], fields["path"]
        column = _label_column(name, dataset.features)
        if column is not None and label_names:
            names = getattr(dataset.features[column], "names", None)
            labels = _labels(name, dataset, column, label_names)
            if names is not None and tuple(names) != label_names:
                raise UserError(f"hf:{name} has other label names than {reference}, or in another order")
            if (largest := labels.max(initial=-1)) >= len(label_names):
                raise UserError(f"hf:{name} has the label {largest}, but there are only {len(label_names)} classes")
            self.labels = labels.astype(np.int32)
        self.fingerprint = self._hash(label_names)

    def _hash(self, label_names: tuple[str, ...]) -> str:
        """Hashes labels, the sizes of the images and a few images: the same on every machine and in every format."""
        import pyarrow.compute as pc

        digest = hashlib.sha256(json.dumps([len(self), label_names]).encode())
        sizes = pc.call_function("binary_length", [self._contents]).fill_null(-1).to_numpy()
        digest.update(sizes.astype(np.int64).tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        for number in sorted({0, len(self) // 2, len(self) - 1}) if len(self) else ():
            content, path = self._contents[number].as_py(), self._paths[number].as_py()
            digest.update(content if content is not None else os.path.basename(path or "").encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        image = self._contents[number].as_py()
        record: dict[str, Any] = {"image": self._read_file(number) if image is None else image}
        if self.labels is not None:
            record["label"] = int(self.labels[number])
        return record

    def _read_file(self, number: int) -> bytes:
        """Reads an image that is not in the Arrow file, which only refers to a file."""
        path = self._paths[number].as_py()
        if path is None:
            raise DamagedError("has no image")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if is_unreadable(error):
                raise unreadable(path, error) from None
            raise DamagedError(f"refers to the file {path}, which is missing") from None

    def record_name(self, number: int) -> str:
        """Returns the number of the example, and the data set and split."""
        return f"example {number:,} of {self._name}"
