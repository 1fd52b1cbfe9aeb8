"""Data sets by name: finds, prepares and loads the one that a config names, and splits it."""

import dataclasses
import difflib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research import randomness
from research.config import DatasetConfig
from research.data import cache, embedded, prepare, tfds_records, tfds_sets
from research.data.cache import Arrays
from research.data.tfds_sets import UnavailableError
from research.errors import UserError
from research.randomness import Stream


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set's splits. Those that `load` returns have read-only arrays, some of them memory maps.

    `make_task` must read the arrays' contents through `statistic` only: without its data set, a network is restored
    with arrays of 0 examples, which its run's data.json describes.

    Attributes:
      name: its TFDS name, or one of `embedded.DATASETS`.
      label_names: the name of each class, by label; () for text and for images without labels.
      train: "image" (uint8 [n,h,w,c]) and, unless the images have no labels, "label" (int32 [n], -1: unlabeled); for
        text "text" (uint8 [n]), its bytes, with a newline between any two examples of a TFDS set.
      validation: held out from train, or the set's own split; None if there is neither.
      test: the split that results are reported on.
      shuffle: whether every epoch is a new permutation of train; otherwise every epoch has the order of train.
      version: the version of the prepared set, if it has one.
      fingerprints: for each split that `load` returned, a hash of its contents.
      statistics: the values that `statistic` has returned, and the number of training examples.
    """

    name: str
    label_names: tuple[str, ...]
    train: Arrays
    validation: Arrays | None
    test: Arrays
    shuffle: bool = True
    version: str = ""
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # `init=False`: `dataclasses.replace` must not copy it, since the copy may have another train split.
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def statistic(self, compute: Callable[[np.ndarray], Any], feature: str) -> Any:
        """Returns a statistic of a feature of train; if a run is resumed or evaluated, the one in its record.

        Args:
          compute: a named function of the feature's array, which returns numbers or (nested) tuples, lists or arrays of
            them. It is called once for each name and feature.
          feature: the feature's name.

        Returns:
          The numbers, in tuples. Floats are exact, also in a record.

        Raises:
          UserError: there are no examples, and the record does not have it.
        """
        assert compute.__name__.isidentifier(), "the name must say what is computed"
        name = f"{feature}.{compute.__name__}"
        if name not in self.statistics:
            if not self.has_examples:
                raise UserError(f"the run's data.json does not have {name}: use the version that wrote it")
            self.statistics[name] = as_tuples(json.loads(json.dumps(compute(self.train[feature]), default=_to_list)))
        return self.statistics[name]

    @property
    def splits(self) -> dict[str, Arrays]:
        """The splits that exist, by name: "train", "validation" and "test"."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def num_examples(self) -> int:
        """The number of training examples, which is known even if there are no examples."""
        return self.statistics.setdefault("num_examples", len(next(iter(self.train.values()))))

    @property
    def has_examples(self) -> bool:
        """True if there are examples; a data set that was read from a record has none."""
        return len(next(iter(self.train.values()))) > 0


def as_tuples(value: Any) -> Any:
    """Turns nested lists into tuples, which are hashable and safe to share."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _to_list(array: np.ndarray) -> Any:
    return array.tolist()


def load(config: DatasetConfig) -> Dataset:
    """Loads the data set that the config names; the caller cannot change what later calls return.

    - A name `a|b` means the first that is available; each unavailable one prints a warning on stderr. A set that is not
      prepared yet is prepared if `research.data.prepare` supports it. `name:1.2.3` means this version.
    - `train_split`, `validation_split` and `test_split` name splits of the set. By default they are the splits called
      train, validation and test. A set without a test split is tested on its validation split, and then, as without a
      validation split, validation is None.
    - With `test_fraction` > 0 the test split is that fraction of train; with `validation_fraction` > 0 validation is
      that fraction of the rest: the same examples for every seed.
    - Of the rest of train, `train_fraction` is kept.

    Raises:
      UserError: none of the names is available, a name, a folder or a split does not exist, the data is damaged,
        unreadable or unsuitable, or a fraction would leave a split empty.
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
    version = ""
    if name in embedded.DATASETS:
        label_names, own = embedded.DATASETS[name]()
        loaders = {split: functools.partial(dict, arrays) for split, arrays in own.items()}
    else:
        label_names, loaders, version = _load_tfds(name, config.data_dir)
    chosen = _choose_splits(name, config, tuple(loaders))
    splits = {role: dict(loaders[split]()) for role, split in chosen.items()}
    if not label_names and "label" in splits["train"]:
        label_names = _number_classes(splits)
    if config.test_fraction:
        splits["train"], splits["test"] = _hold_out(splits["train"], config.test_fraction, "test")
    if config.validation_fraction:
        splits["train"], splits["validation"] = _hold_out(splits["train"], config.validation_fraction, "validation")
    if config.train_fraction < 1:
        splits["train"] = _subset(splits["train"], config.train_fraction)
    arrays = {role: cache.read_only(split) for role, split in splits.items()}
    return Dataset(
        name,
        label_names,
        arrays["train"],
        arrays.get("validation"),
        arrays["test"],
        version=version,
        fingerprints={role: cache.fingerprint(split) for role, split in arrays.items()},
    )


def _choose_splits(name: str, config: DatasetConfig, present: Sequence[str]) -> dict[str, str]:
    """Returns the set's split for each of "train", "validation" and "test", except those that are held out."""
    for role in ("validation", "test"):
        split, fraction = getattr(config, f"{role}_split"), getattr(config, f"{role}_fraction")
        if split and fraction:
            raise UserError(
                f"--config.dataset.{role}_split={split}: --config.dataset.{role}_fraction={fraction} holds out another "
                "split; give one of the two"
            )
    test = config.test_split
    if not test and not config.test_fraction:
        test = next((split for split in ("test", "validation") if split in present), "")
        if not test:
            raise UserError(
                f"--config.dataset.name={name}: the set has no test split, only {', '.join(present)}: choose one with "
                "--config.dataset.test_split, or hold out examples with --config.dataset.test_fraction=0.1"
            )
    validation = config.validation_split
    if not validation and not config.validation_fraction and "validation" not in (config.train_split, test):
        validation = "validation" if "validation" in present else ""
    chosen = {"train": config.train_split, "validation": validation, "test": test}
    chosen = {role: split for role, split in chosen.items() if split}
    for role, split in chosen.items():
        if split not in present:
            raise UserError(
                f"--config.dataset.{role}_split={split}: {name} has no such split, only {', '.join(present) or 'none'}"
            )
    for one, other in itertools.combinations(chosen, 2):
        if chosen[one] == chosen[other]:
            raise UserError(
                f"--config.dataset.name={name}: {one} and {other} would both be the split {chosen[one]}; choose "
                f"another with --config.dataset.{one}_split or --config.dataset.{other}_split"
            )
    return chosen


def _number_classes(splits: dict[str, Arrays]) -> tuple[str, ...]:
    """Returns the names of integer labels, "0" to the largest in train; removes labels that are not class numbers."""
    largest = splits["train"]["label"].max()
    if 0 <= largest < tfds_records.MOST_CLASSES:
        return tuple(map(str, range(largest + 1)))
    for split in splits.values():
        del split["label"]
    return ()


def _load_tfds(name: str, data_dir: str) -> tuple[tuple[str, ...], dict[str, Callable[[], Arrays]], str]:
    folder = tfds_sets.data_folder(data_dir)
    path = tfds_sets.find(name, folder)
    if path is None and prepare.is_preparable(name):
        prepare.prepare(tfds_sets.split_version(name)[0], folder)
        path = tfds_sets.find(name, folder)
    if path is None:
        raise _not_found(name, folder)
    return *tfds_sets.load(name, path), path.name


def _not_found(name: str, folder: Path) -> UserError:
    known = [*tfds_records.import_tfds().list_builders(with_community_datasets=False), *embedded.DATASETS]
    base, _ = tfds_sets.split_version(name)
    if base.partition("/")[0] not in known:
        near = difflib.get_close_matches(base, known)
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        return UserError(f"--config.dataset.name={name}: neither a TFDS data set nor prepared in {folder}{suggestion}")
    command = f"`tfds build {name} --file_format=array_record --data_dir={folder}`"
    return UnavailableError(name, f"is not prepared in {folder}", f"prepare it by {command} (it needs TensorFlow)")


def _hold_out(train: Arrays, fraction: float, role: str) -> tuple[Arrays, Arrays]:
    """Splits train into (train, `role`): a fixed random subset of examples, or the end of a text."""
    count = len(next(iter(train.values())))
    held_out = round(fraction * count)
    if not 0 < held_out < count:
        raise UserError(
            f"--config.dataset.{role}_fraction={fraction} leaves {count - held_out} examples to train on and "
            f"{held_out} to {'validate' if role == 'validation' else role} on"
        )
    if "text" in train:
        text = train["text"]
        return {"text": text[:-held_out]}, {"text": text[-held_out:]}
    stream = Stream.HOLD_OUT if role == "validation" else Stream.HOLD_OUT_TEST
    order = randomness.generator(stream).permutation(count)
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
