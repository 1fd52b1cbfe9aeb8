"""Reads and writes data.json: fingerprints, shapes, statistics and label names of the data of a run.

A text's tokenizer.json is copied next to it, so that a run can be evaluated and sampled from without the original.

It has a checksum, since a network with damaged statistics would compute wrong results without an error.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from research.data import tokenization
from research.data.cache import Arrays
from research.data.sources import Dataset, Split, as_tuples
from research.data.tokenization import Tokenizer
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.record import storage
from research.record.workdir import read_json

_NAME = "data.json"
_TOKENIZER = "tokenizer.json"


def write(workdir: Path, dataset: Dataset) -> None:
    """Writes data.json and the tokenizer, atomically.

    Raises:
      RecordError: it could not be written.
    """
    values = {
        "name": dataset.name,
        "version": dataset.version,
        "num_examples": dataset.num_examples,
        "shuffle": dataset.shuffle,
        "label_names": dataset.label_names,
        "fingerprints": dict(dataset.fingerprints),
        "splits": {name: _features(split) for name, split in dataset.splits.items()},
        "tokenizer": dataset.tokenizer.kind if dataset.tokenizer else "",
        "statistics": {name: value for name, value in dataset.statistics.items() if name != "num_examples"},
    }
    values["crc32"] = _crc(values)
    if dataset.tokenizer and dataset.tokenizer.content:
        storage.replace(workdir / _TOKENIZER, dataset.tokenizer.content.encode())
    # One line for each entry: statistics may have thousands of numbers.
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    storage.replace(workdir / _NAME, f"{{\n{lines}\n}}\n".encode())


def _crc(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _features(split: Split) -> dict[str, Any]:
    """Returns the dtype and shape of each feature, with the number of examples as the first size."""
    return {name: {"dtype": str(array.dtype), "shape": array.shape} for name, array in split.items()}


def read(workdir: Path) -> Dataset | None:
    """Returns the data set of the run in `workdir`, without examples, or None if the run has no data.json.

    Raises:
      UserError: data.json is damaged or of another version.
    """
    values = read_json(workdir / _NAME)
    if values is None:
        return None
    try:
        if values.pop("crc32") != _crc(values):
            raise ValueError("its checksum differs")
        splits = {name: _empty(features) for name, features in values["splits"].items()}
        dataset = Dataset(
            values["name"],
            tuple(values["label_names"]),
            splits["train"],
            splits.get("validation"),
            splits["test"],
            values["shuffle"],
            values["version"],
            values["fingerprints"],
            _tokenizer(workdir, values.get("tokenizer", ""), tuple(values["label_names"])),
        )
        statistics = {name: as_tuples(value) for name, value in values["statistics"].items()}
        dataset.statistics.update(statistics, num_examples=int(values["num_examples"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{workdir / _NAME} is damaged or of another version ({type(error).__name__}: {error}): restore it from a "
            "copy, or delete it to use the data set on this machine"
        ) from None
    return dataset


def _tokenizer(workdir: Path, kind: str, names: tuple[str, ...]) -> Tokenizer | None:
    path = workdir / _TOKENIZER
    has_file = kind not in ("", tokenization.Bytes.kind, tokenization.Numbers.kind)
    if has_file and not path.exists():
        raise UserError(f"{path} is missing: restore it from a copy of the run, or copy the run's tokenizer there")
    return tokenization.restore(kind, names, path.read_bytes().decode() if has_file else "", str(path))


def recorded_tokenizer(config: DatasetConfig, recorded: Dataset | None, workdir: Path) -> DatasetConfig:
    """Returns the config with the run's copy of its tokenizer, if the file that it names is gone.

    Raises:
      UserError: the config names another tokenizer than that of the run.
    """
    if recorded is None or recorded.tokenizer is None:
        return config
    there = recorded.tokenizer
    if there.content and config.tokenizer and not tokenization.exists(config.tokenizer):
        return dataclasses.replace(config, tokenizer=str(workdir / _TOKENIZER))
    given = tokenization.read(config.tokenizer)
    here = given.kind if given else there.kind if not there.content else tokenization.Bytes.kind
    if here != there.kind:
        raise UserError(
            f"--workdir={workdir} holds a run with another tokenizer ({there.kind} there, {here} here): set "
            f"--config.dataset.tokenizer={workdir / _TOKENIZER if there.content else ''}"
        )
    return config


def _empty(features: dict[str, Any]) -> Arrays:
    return {name: np.empty((0, *x["shape"][1:]), x["dtype"]) for name, x in features.items()}


def differences(dataset: Dataset, recorded: Dataset) -> str:
    """Names the splits whose fingerprints are not those of the record, with both; empty if there are none."""
    pairs = ((name, dataset.fingerprints.get(name), old) for name, old in recorded.fingerprints.items())
    return ", ".join(f"{name} {old} there, {new} here" for name, new, old in pairs if new != old)


def check_compatible(dataset: Dataset, recorded: Dataset, workdir: Path) -> None:
    """Raises `UserError` if the classes, or the shapes or dtypes of the examples, differ from the record."""
    kinds = [
        {"label names": x.label_names}
        | {
            f"{name} of {split}": f"{array.dtype}{list(array.shape[1:])}"
            for split, arrays in x.splits.items()
            for name, array in arrays.items()
        }
        for x in (recorded, dataset)
    ]
    there, here = kinds
    for name in sorted(there.keys() | here.keys()):
        pair = there.get(name, "none"), here.get(name, "none")
        if pair[0] != pair[1]:
            raise UserError(
                f"--workdir={workdir} holds a run trained on other data ({name}: {_short(pair[0])} there, "
                f"{_short(pair[1])} here): set --config.dataset.data_dir to the folder of its data set"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
