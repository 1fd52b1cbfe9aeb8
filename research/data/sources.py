"""Data sets by name: finds, prepares and loads the one that a config names, and splits it."""

import dataclasses
import difflib
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

    `make_task` must not read the arrays' contents other than by `statistic`: without its data set, a network is
    restored with arrays of 0 examples, as its run's data.json describes them.

    Attributes:
      name: its TFDS name, or one of `embedded.DATASETS`.
      label_names: the name of each class, by label; () for text.
      train: "image" (uint8 [n,h,w,c]) and "label" (int32 [n]); for text "text" (uint8 [n], its bytes).
      validation: held out from train, or the set's own split; None if there is neither.
      test: the split that results are reported on.
      shuffle: whether every epoch is a new permutation of train; otherwise the examples come in their own order.
      version: the version of the prepared set, if it has one.
      fingerprints: for each split that `load` returned, a hash of its contents.
      statistics: what `statistic` has returned, and the number of training examples.
    """

    name: str
    label_names: tuple[str, ...]
    train: Arrays
    validation: Arrays | None
    test: Arrays
    shuffle: bool = True
    version: str = ""
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Not an argument of `dataclasses.replace`: the copy may have another train split.
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def statistic(self, compute: Callable[[np.ndarray], Any], feature: str) -> Any:
        """Returns a statistic of a feature of train; when a run is continued or evaluated, the one in its record.

        Args:
          compute: a named function of the feature's array, which returns numbers or (nested) tuples, lists or arrays of
            them. It is called once for each name and feature.
          feature: the feature's name.

        Returns:
          The numbers, in tuples. Their floats are exact, in a record, too.

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
    def num_examples(self) -> int:
        """The number of training examples, of which a record without examples knows, too."""
        return self.statistics.setdefault("num_examples", len(next(iter(self.train.values()))))

    @property
    def has_examples(self) -> bool:
        """Whether there are examples; otherwise this only describes them, as in a record."""
        return len(next(iter(self.train.values()))) > 0


def as_tuples(value: Any) -> Any:
    """Turns lists into tuples, which are hashable, and cannot be changed by those who share them."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _to_list(array: np.ndarray) -> Any:
    return array.tolist()


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
    version = ""
    if name in embedded.DATASETS:
        label_names, splits = embedded.DATASETS[name]()
    else:
        label_names, splits, version = _load_tfds(name, config.data_dir)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if missing := {"train", "test"} - splits.keys():
        raise UserError(f"--config.dataset.name={name}: the set has no {min(missing)} split")
    train, validation = splits["train"], splits.get("validation")
    if config.validation_fraction:
        train, validation = _hold_out(train, config.validation_fraction)
    if config.train_fraction < 1:
        train = _subset(train, config.train_fraction)
    used = {"train": train, "validation": validation, "test": splits["test"]}
    splits = {split: cache.read_only(arrays) for split, arrays in used.items() if arrays is not None}
    return Dataset(
        name,
        label_names,
        splits["train"],
        splits.get("validation"),
        splits["test"],
        version=version,
        fingerprints={split: cache.fingerprint(arrays) for split, arrays in splits.items()},
    )


def _load_tfds(name: str, data_dir: str) -> tuple[tuple[str, ...], dict[str, Arrays], str]:
    folder = tfds_sets.data_folder(data_dir)
    path = tfds_sets.find(name, folder)
    if path is None and prepare.is_preparable(name):
        prepare.prepare(name, folder)
        path = tfds_sets.find(name, folder)
    if path is None:
        raise _not_found(name, folder)
    return *tfds_sets.load(name, path), path.name


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
