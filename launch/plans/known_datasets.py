"""Data sets of known size, so that a plan needs no copy of them."""

import dataclasses
import functools
from typing import Any

import numpy as np

from research.data import own_data, tfds_sets
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class KnownDataset:
    """The published sizes of a data set of images, from https://www.tensorflow.org/datasets/catalog/NAME.

    Attributes:
      splits: the number of examples of each split that has labels.
      classes: the number of classes.
      shape: (h, w, c) of all images; () if they differ.
    """

    splits: dict[str, int]
    classes: int
    shape: tuple[int, ...] = ()


KNOWN = {
    "caltech101": KnownDataset({"train": 3_059, "test": 6_084}, 102),
    "cifar10": KnownDataset({"train": 50_000, "test": 10_000}, 10, (32, 32, 3)),
    "cifar100": KnownDataset({"train": 50_000, "test": 10_000}, 100, (32, 32, 3)),
    "fashion_mnist": KnownDataset({"train": 60_000, "test": 10_000}, 10, (28, 28, 1)),
    "food101": KnownDataset({"train": 75_750, "validation": 25_250}, 101),
    "imagenet2012": KnownDataset({"train": 1_281_167, "validation": 50_000}, 1_000),
    "mnist": KnownDataset({"train": 60_000, "test": 10_000}, 10, (28, 28, 1)),
    "oxford_iiit_pet": KnownDataset({"train": 3_680, "test": 3_669}, 37),
    "places365_small": KnownDataset({"train": 1_803_460, "validation": 36_500}, 365),
    "svhn_cropped": KnownDataset({"train": 73_257, "test": 26_032}, 10, (32, 32, 3)),
}


@dataclasses.dataclass(frozen=True)
class _BlankImages:
    """Black images in place of a split's: a plan depends on their number and shape only."""

    number: int
    shape: tuple[int, ...]
    classes: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {"image": np.zeros(self.shape, np.uint8), "label": index % self.classes}


def add_missing(experiment: Experiment, config: DatasetConfig) -> Experiment:
    """Returns the experiment with blank images for each known set that the config names and that is not prepared here.

    It prints a line for each.
    """
    blank: dict[str, own_data.Load] = {}
    for name in map(str.strip, config.name.split("|")):
        known = KNOWN.get(name.partition(":")[0])
        if known and name not in experiment.datasets and not _is_prepared(name, config.data_dir):
            print(f"{name} is not prepared here: planned by its published size, {known.splits['train']:,} train")
            blank[name] = functools.partial(_load, name, known)
    return dataclasses.replace(experiment, datasets={**experiment.datasets, **blank})


def _is_prepared(name: str, data_dir: str) -> bool:
    try:
        return tfds_sets.find(name, tfds_sets.data_folder(data_dir)) is not None
    except UserError:  # there is no such folder on this machine, or the set has another version
        return False


def _load(name: str, known: KnownDataset, config: DatasetConfig) -> tuple[tuple[str, ...], own_data.Splits]:
    size = config.image_size
    if not (size or known.shape):
        raise UserError(f"--config.dataset.name={name}: its images differ in size; give --config.dataset.image_size")
    label_names = tuple(map(str, range(known.classes)))
    if size:
        shape = known.shape or (size, size, 3)
        return label_names, {split: _BlankImages(n, shape, known.classes) for split, n in known.splits.items()}
    # Without memory: every image is the same byte.
    return label_names, {
        split: {
            "image": np.broadcast_to(np.zeros((), np.uint8), (n, *known.shape)),
            "label": np.arange(n, dtype=np.int32) % known.classes,
        }
        for split, n in known.splits.items()
    }
