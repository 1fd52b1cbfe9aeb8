"""Data sets by name: finds, prepares and loads the one that a config names, and splits it."""

import dataclasses
import difflib
import itertools
import sys
from pathlib import Path

import numpy as np

from research import randomness
from research.config import DatasetConfig
from research.data import cache, embedded, prepare, tfds_sets
from research.data.cache import Arrays
from research.data.tfds_sets import UnavailableError
from research.errors import UserError
from research.randomness import Stream


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set's splits. Those that `load` returns have read-only arrays, some of them memory maps.

    Attributes:
      name: its TFDS name, or one of `embedded.DATASETS`.
      label_names: the name of each class, by label; () for text.
      train: "image" (uint8 [n,h,w,c]) and "label" (int32 [n]); for text "text" (uint8 [n], its bytes).
      validation: held out from train, or the set's own split; None if there is neither.
      test: the split that results are reported on.
      shuffle: whether every epoch is a new permutation of train; otherwise the examples come in their own order.
    """

    name: str
    label_names: tuple[str, ...]
    train: Arrays
    validation: Arrays | None
    test: Arrays
    shuffle: bool = True


def load(config: DatasetConfig) -> Dataset:
    """Loads the data set that the config names; the caller cannot change what later calls return.

    - A name `a|b` means the first that is available; each unavailable one gives a warning on stderr. A set that is not
      prepared yet is prepared if `research.data.prepare` supports it.
    - Validation is the set's own split of that name, or, with `validation_fraction` > 0, that fraction of train: the
      same examples for every seed. If a set has no test split, its validation split is the test split.
    - Of the rest of train, `train_fraction` is kept.

    Raises:
      UserError: none of the names is available, a name or a folder does not exist, the data is damaged or unsuitable,
        or a fraction would leave validation or train empty.
    """
    if config.data_dir:
        tfds_sets.data_folder(config.data_dir)  # a missing folder is an error even if the data set needs none
    names = [name.strip() for name in config.name.split("|")]
    if not all(names):
        raise UserError(f"--config.dataset.name={config.name!r}: name a data set, or several separated by |")
    for name, following in itertools.pairwise(names):
        try:
            return _load(name, config)
        except UnavailableError as error:
            remedy = f"To use {name}: {error.remedy}"
            print(f"WARNING: {name} {error.reason}: using {following} instead. {remedy}", file=sys.stderr)
    return _load(names[-1], config)


def _load(name: str, config: DatasetConfig) -> Dataset:
    label_names, splits = embedded.DATASETS[name]() if name in embedded.DATASETS else _load_tfds(name, config.data_dir)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if missing := {"train", "test"} - splits.keys():
        raise UserError(f"--config.dataset.name={name}: the set has no {min(missing)} split")
    train, validation = splits["train"], splits.get("validation")
    if config.validation_fraction:
        train, validation = _hold_out(train, config.validation_fraction)
    if config.train_fraction < 1:
        train = _subset(train, config.train_fraction)
    return Dataset(
        name,
        label_names,
        cache.read_only(train),
        None if validation is None else cache.read_only(validation),
        cache.read_only(splits["test"]),
    )


def _load_tfds(name: str, data_dir: str) -> tuple[tuple[str, ...], dict[str, Arrays]]:
    folder = tfds_sets.data_folder(data_dir)
    path = tfds_sets.find(name, folder)
    if path is None and prepare.is_preparable(name):
        prepare.prepare(name, folder)
        path = tfds_sets.find(name, folder)
    if path is None:
        raise _not_found(name, folder)
    return tfds_sets.load(name, path)


def _not_found(name: str, folder: Path) -> UserError:
    known = [*tfds_sets.import_tfds().list_builders(with_community_datasets=False), *embedded.DATASETS]
    if name.partition("/")[0] not in known:
        near = difflib.get_close_matches(name, known)
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        return UserError(f"--config.dataset.name={name}: neither a TFDS data set nor prepared in {folder}{suggestion}")
    command = f"`tfds build {name} --file_format=array_record --data_dir={folder}`"
    return UnavailableError(name, f"is not prepared in {folder}", f"prepare it by {command} (it needs TensorFlow)")


def _hold_out(train: Arrays, fraction: float) -> tuple[Arrays, Arrays]:
    """Splits train into (train, validation): a fixed random subset of examples, or the end of a text."""
    count = len(next(iter(train.values())))
    held_out = round(fraction * count)
    if not 0 < held_out < count:
        raise UserError(
            f"--config.dataset.validation_fraction={fraction} leaves {count - held_out} examples to train on and "
            f"{held_out} to validate on"
        )
    if "text" in train:
        text = train["text"]
        return {"text": text[:-held_out]}, {"text": text[-held_out:]}
    order = randomness.generator(Stream.HOLD_OUT).permutation(count)
    parts = np.sort(order[held_out:]), np.sort(order[:held_out])
    kept, taken = ({name: array[part] for name, array in train.items()} for part in parts)
    return kept, taken


def _subset(train: Arrays, fraction: float) -> Arrays:
    """Returns a fixed random subset of the examples, or the beginning of a text; smaller fractions are nested in it."""
    count = len(next(iter(train.values())))
    kept = round(fraction * count)
    if not kept:
        raise UserError(f"--config.dataset.train_fraction={fraction} leaves none of {count} examples")
    if "text" in train:
        return {"text": train["text"][:kept]}
    part = np.sort(randomness.generator(Stream.TRAIN_FRACTION).permutation(count)[:kept])
    return {name: array[part] for name, array in train.items()}
