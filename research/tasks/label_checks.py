"""Checks that a data set can be classified: each example has a class, which train has, too."""

from typing import Any

import numpy as np

from research.data.sources import Dataset
from research.data.streamed import Column, StreamedSplit
from research.errors import UserError

_NUM_CHECKED = 16  # labels that are known only after reading their records


def check(dataset: Dataset) -> None:
    """Checks the labels of all splits; of those that are known only after reading their records, a few.

    Raises:
      UserError: there are no labels, or labels that are no integers; there is one class only; a split has examples
        without a label or with one that train lacks.
    """
    labels = {role: _labels(dataset, role, split) for role, split in dataset.splits.items()}
    for role, values in labels.items():
        _check_range(dataset, role, values)
    if len(dataset.label_names) == 1:
        raise UserError(f"{_set(dataset)} has only one class, {dataset.label_names[0]}; classification needs two")
    if any(isinstance(split.get("label"), Column) for split in dataset.splits.values()):
        return
    known = np.unique(labels["train"])
    if len(known) == 1:
        raise UserError(f"{_set(dataset)}: all examples of train have the class {_name(dataset, known[0])}")
    for role, values in labels.items():
        if len(unknown := np.setdiff1d(values, known)):
            more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            raise UserError(
                f"{_set(dataset)}: the class {_name(dataset, unknown[0])}{more} of {role} has no examples in train: "
                "add some, hold out fewer, or remove the class"
            )


def _set(dataset: Dataset) -> str:
    return f"--config.dataset.name={dataset.name}"


def _name(dataset: Dataset, label: int) -> str:
    return dataset.label_names[label] if dataset.label_names else str(label)


def _labels(dataset: Dataset, role: str, split: Any) -> np.ndarray:
    """Returns the labels of a split, int [n], or a few of them."""
    if "label" not in split:
        raise UserError(f"{_set(dataset)} has no class labels, so it cannot be classified")
    if not dataset.label_names and isinstance(split, StreamedSplit):
        raise UserError(f"{_set(dataset)}: the number of classes is unknown: name its labels")
    labels = split["label"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{_set(dataset)}: label of {role} is {labels.dtype}{list(labels.shape)}; it must be integers [n], the "
            "number of each example's class"
        )
    if isinstance(split, StreamedSplit) and isinstance(labels, Column):
        split.require_labels()  # the others are checked when they are read
        labels = labels.sample(_NUM_CHECKED)
    return np.asarray(labels)


def _check_range(dataset: Dataset, role: str, labels: np.ndarray) -> None:
    largest = len(dataset.label_names) - 1
    unlabeled, unknown = np.sum(labels < 0), np.sum(labels > largest) if dataset.label_names else 0
    if unlabeled or unknown:
        problem = "no label (-1)" if unlabeled else f"a label above {largest}, the largest in train"
        hold_out = "" if role == "train" else f", or hold some out with --config.dataset.{role}_fraction=0.1"
        raise UserError(
            f"{_set(dataset)}: {unlabeled or unknown:,} of {len(labels):,} {role} examples have {problem}; choose "
            f"another split with --config.dataset.{role}_split{hold_out}"
        )
