"""Data sets by name: finds, prepares and loads the one that a config names, and splits it."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from research.config import DatasetConfig
from research.data import cache, named_sets, own_data, splits, text_sets, token_store, tokenization
from research.data.source import ArraySource, Source, Subset
from research.data.splits import Examples
from research.data.streamed import Column, StreamedSplit
from research.data.tokenization import FromJson, Tokenizer
from research.errors import UserError

Split = Mapping[str, Any]  # `Arrays`, or a `StreamedSplit`, whose columns behave like arrays


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set's splits. Those that `load` returns have read-only arrays, some of them memory maps, or are streamed.

    `make_task` must read the arrays' contents through `statistic` only: without its data set, a network is restored
    with arrays of 0 examples, which its run's data.json describes.

    Attributes:
      name: its TFDS name, or one of `embedded.DATASETS`.
      label_names: the name of each class, by label; () for text and for images without labels.
      train: "image" (uint8 [n,h,w,c]) and, unless the images have no labels, "label" (int32 [n], -1: unlabeled); for
        text "text" [n], its bytes (uint8) or its tokens (uint16 or uint32), with a newline between any two examples
        of a TFDS or Hugging Face set. The features of an experiment's own data have the names that it gives them.
      validation: held out from train, or the set's own split; None if there is neither.
      test: the split that results are reported on.
      shuffle: whether every epoch is a new permutation of train; otherwise every epoch has the order of train.
      version: the version of the prepared set, if it has one.
      fingerprints: for each split that `load` returned, a hash of its contents.
      tokenizer: of a text; None for bytes until `text.streams` has found their vocabulary.
      is_reduced: whether examples of the set's train split were held out or left out.
      statistics: the values that `statistic` has returned, and the number of training examples.
    """

    name: str
    label_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    shuffle: bool = True
    version: str = ""
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    is_reduced: bool = False
    # `init=False`: `dataclasses.replace` must not copy it, since the copy may have another train split.
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def statistic(self, compute: Callable[[np.ndarray], Any], feature: str) -> Any:
        """Returns a statistic of a feature of train; if a run is resumed or evaluated, the one in its record.

        If the examples are read when they are needed, it is the statistic of a fixed sample (`Column.sample`).

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
            column = self.train[feature]
            array = column.sample() if isinstance(column, Column) else column
            self.statistics[name] = as_tuples(json.loads(json.dumps(compute(array), default=_to_list)))
        return self.statistics[name]

    @property
    def splits(self) -> dict[str, Split]:
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


def load(config: DatasetConfig, own: Mapping[str, own_data.Load] = MappingProxyType({})) -> Dataset:
    """Loads the data set that the config names; the caller cannot change what later calls return.

    - `folder`, `text`, `hf:NAME`, a name in `own`, an embedded or a TFDS set.
    - A name `a|b` means the first that is available; each unavailable one prints a warning on stderr. A set that is not
      prepared yet is prepared if `research.data.prepare` supports it. `name:1.2.3` means this version.
    - `train_split`, `validation_split` and `test_split` name splits of the set. By default they are the splits called
      train, validation and test. A set without a test split is tested on its validation split, and then, as without a
      validation split, validation is None.
    - With `test_fraction` > 0 the test split is that fraction of train; with `validation_fraction` > 0 validation is
      that fraction of the rest: the same examples for every seed.
    - Of the rest of train, `train_fraction` is kept.
    - With `image_size`, and if it is no dictionary of arrays, a split is a `StreamedSplit`.
    - A text becomes the tokens of `tokenizer`, or bytes. If train is its only split, its end is held out, see
      `text_source.hold_out`; fractions of it are its beginning or end.

    Args:
      config: of the data set.
      own: functions that load the experiment's own data sets, by name.

    Raises:
      UserError: none of the names is available, a name, a folder or a split does not exist, the data is damaged,
        unreadable or unsuitable, or a fraction would leave a split empty.
    """
    _check_crops(config)
    tokenizer = tokenization.read(config.tokenizer)
    return named_sets.first_available(config.name, lambda name: _load(name, config, own, tokenizer))


def _check_crops(config: DatasetConfig) -> None:
    """Raises `UserError` if fields of the crops were changed but have no effect."""
    unused = []
    if not config.image_size:
        unused = ["train_image_size", "train_crop", "crop_min_area", "center_crop"]
    elif config.train_crop != "random_resized":
        unused = ["crop_min_area"]
    default = DatasetConfig()
    changed = [field for field in unused if getattr(config, field) != getattr(default, field)]
    if changed:
        given = ", ".join(f"--config.dataset.{field}={getattr(config, field)}" for field in changed)
        defaults = " ".join(f"--config.dataset.{field}={getattr(default, field)}" for field in changed)
        why = f"train_crop={config.train_crop}" if config.image_size else "image_size=0"
        raise UserError(f"{given}: no effect with --config.dataset.{why}; change it, or restore {defaults}")


def open_records(name: str, data_dir: str) -> tuple[tuple[str, ...], dict[str, Source]]:
    """Opens all splits of a set of images: (label names, the records of each split).

    Raises:
      UserError: as `load`, or the set has no images.
    """
    config = DatasetConfig(name=name, data_dir=data_dir, image_size=1)  # so that images are not decoded in advance
    label_names, loaders, _ = named_sets.open_splits(name, config)
    opened = {split: _with_images(name, named_sets.open_split(loader)) for split, loader in loaders.items()}
    return label_names, {split: _as_records(examples) for split, examples in opened.items()}


def _with_images(name: str, examples: Any) -> Any:
    """Returns a split unless it is a text or lacks images, which is an error."""
    if isinstance(examples, Source) or (isinstance(examples, dict) and "image" in examples):
        return examples
    raise UserError(f"--config.dataset.name={name} has no images")


def _as_records(examples: Examples) -> Source:
    return examples if isinstance(examples, Source) else ArraySource(examples, cache.fingerprint(examples))


def _load(
    name: str, config: DatasetConfig, own: Mapping[str, own_data.Load], json_tokenizer: FromJson | None
) -> Dataset:
    label_names, loaders, version = named_sets.open_splits(name, config, own)
    chosen = splits.choose(name, config, tuple(loaders))
    loaded = {role: named_sets.open_split(loaders[split]) for role, split in chosen.items()}
    if config.image_size:  # before a long text is tokenized
        loaded = {role: _with_images(name, split) for role, split in loaded.items()}
    examples, tokenizer = text_sets.tokenize(name, loaded, json_tokenizer)
    label_names = label_names or splits.number_classes(examples)
    if config.test_fraction:
        examples["train"], examples["test"] = splits.hold_out(examples["train"], config.test_fraction, "test")
    if config.validation_fraction:
        fraction = config.validation_fraction
        examples["train"], examples["validation"] = splits.hold_out(examples["train"], fraction, "validation")
    if config.train_fraction < 1:
        examples["train"] = splits.subset(examples["train"], config.train_fraction)
    as_named = dataclasses.replace(config, name=name)
    ready = {role: _ready(role, split, as_named, len(label_names)) for role, split in examples.items()}
    is_reduced = config.train_fraction < 1 or bool(config.test_fraction or config.validation_fraction)
    is_reduced |= any(isinstance(split, Subset) for split in loaded.values())
    if config.max_damaged and not any(isinstance(split, StreamedSplit) for split in ready.values()):
        raise UserError("--config.dataset.max_damaged needs --config.dataset.image_size: other sets are decoded once")
    return Dataset(
        name,
        label_names,
        ready["train"],
        ready.get("validation"),
        ready["test"],
        version=version,
        fingerprints={
            role: split.fingerprint if isinstance(split, StreamedSplit) else _fingerprint(split)
            for role, split in ready.items()
        },
        tokenizer=tokenizer,
        is_reduced=is_reduced,
    )


def _fingerprint(arrays: Split) -> str:
    return token_store.fingerprint(arrays["text"]) if arrays.keys() == {"text"} else cache.fingerprint(arrays)


def _ready(role: str, examples: Examples, config: DatasetConfig, num_classes: int) -> Split:
    """Returns the split with its images cropped when they are read, or as read-only arrays."""
    if isinstance(examples, Source) or config.image_size:
        return StreamedSplit(role, _as_records(examples), config, num_classes)
    return cache.read_only(examples)
