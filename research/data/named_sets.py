"""Opens the splits of a data set by its name: one of the sources, without loading it yet."""

import difflib
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from research.config import DatasetConfig
from research.data import embedded, folder, hugging_face, own_data, prepare, text_sets, tfds_records, tfds_sets
from research.data.source import Source
from research.data.text_source import Text, hold_out
from research.data.tfds_sets import UnavailableError
from research.errors import UserError

_T = TypeVar("_T")


def open_splits(
    name: str, config: DatasetConfig, own: Mapping[str, own_data.Load] = MappingProxyType({})
) -> tuple[tuple[str, ...], Mapping[str, Any], str]:
    """Opens a data set by its name.

    Args:
      name: of one data set, as in `sources.load`.
      config: of the data set.
      own: functions that load the experiment's own data sets, by name.

    Returns:
      The label names; for each split a text or a function that loads it, see `open_split`; and the version.

    Raises:
      UserError: as `sources.load`.
    """
    if name in own or name in embedded.DATASETS:
        if config.data_dir and name not in own:
            tfds_sets.data_folder(config.data_dir)  # a missing folder is an error even if the data set needs none
        label_names, splits = own_data.load(name, own[name], config) if name in own else embedded.DATASETS[name]()
        return label_names, {split: functools.partial(_copied, examples) for split, examples in splits.items()}, ""
    if name == "folder":
        label_names, listings = folder.load(config.data_dir, hold_out=not config.test_fraction)
        return label_names, listings, ""
    if name == "text":
        return (), _with_held_out(text_sets.open_files(config.data_dir), config), ""
    if name.startswith("hf:"):
        label_names, loaders, version = hugging_face.load(name.removeprefix("hf:"), config.data_dir)
    else:
        label_names, loaders, version = _load_tfds(name, config, own)
    return label_names, _with_held_out(loaders, config), version


def first_available(names: str, load: Callable[[str], _T]) -> _T:
    """Returns `load(name)` of the first name of `a|b` that is available; prints a warning for each one before.

    Raises:
      UserError: a name is empty, or as `load`.
    """
    split_names = [name.strip() for name in names.split("|")]
    if not all(split_names):
        raise UserError(f"--config.dataset.name={names!r}: name a data set, or several separated by |")
    for name, following in itertools.pairwise(split_names):
        try:
            return load(name)
        except UnavailableError as error:
            remedy = f"To use {name}: {error.remedy}"
            print(f"WARNING: {name} {error.reason}: using {following} instead. {remedy}", file=sys.stderr)
    return load(split_names[-1])


def open_split(loader: Any) -> Any:
    """Returns a split that `open_splits` has opened: a text as it is, otherwise what the function returns."""
    return loader if text_sets.has_parts(loader) else loader()


def open_text(name: str, data_dir: str) -> Text:
    """Opens the training split of a text by the name of its set.

    Raises:
      UserError: as `open_splits`, or the set is not a text or has no split train.
    """
    return first_available(name, lambda one: _open_text(one, data_dir))


def _open_text(name: str, data_dir: str) -> Text:
    _, loaders, _ = open_splits(name, DatasetConfig(name=name, data_dir=data_dir))
    if "train" not in loaders:
        raise UserError(f"--name={name} has no split train, only {', '.join(loaders)}")
    return text_sets.as_text(name, open_split(loaders["train"]))


def _with_held_out(loaders: Mapping[str, Any], config: DatasetConfig) -> Mapping[str, Any]:
    """Holds out the end of a text that is not split, unless the config says how to."""
    if loaders.keys() != {"train"} or config.test_fraction or not text_sets.has_parts(loaders["train"]):
        return loaders
    return hold_out(loaders["train"], validation=not config.validation_fraction)


def _copied(examples: Any) -> Any:
    return examples if isinstance(examples, Source) else dict(examples)


def _load_tfds(name: str, config: DatasetConfig, own: Iterable[str]) -> tuple[tuple[str, ...], Mapping[str, Any], str]:
    data_folder = tfds_sets.data_folder(config.data_dir)
    path = tfds_sets.find(name, data_folder)
    if path is None and prepare.is_preparable(name):
        prepare.prepare(tfds_sets.split_version(name)[0], data_folder)
        path = tfds_sets.find(name, data_folder)
    if path is None:
        raise _not_found(name, data_folder, own)
    return *tfds_sets.load(name, path, as_records=config.image_size > 0), path.name


def _not_found(name: str, folder: Path, own: Iterable[str]) -> UserError:
    known = [
        *tfds_records.import_tfds().list_builders(with_community_datasets=False),
        "folder",
        "text",
        *embedded.DATASETS,
    ]
    base, _ = tfds_sets.split_version(name)
    if base.partition("/")[0] not in known:
        near = difflib.get_close_matches(base, [*own, *known])
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        return UserError(f"--config.dataset.name={name}: neither a TFDS data set nor prepared in {folder}{suggestion}")
    command = f"`tfds build {name} --file_format=array_record --data_dir={folder}`"
    return UnavailableError(name, f"is not prepared in {folder}", f"prepare it by {command} (it needs TensorFlow)")
