"""Checks that a data set suits classification: every example has a label, and train has every class."""

import sys
from typing import Any

import numpy as np

from research.data.sources import Dataset
from research.data.streamed import Column, StreamedSplit
from research.errors import UserError

_SAMPLE_SIZE = 16  # labels that are known only after reading their records


def check(dataset: Dataset) -> None:
    """Checks the labels of all splits, or a sample where labels are known only after reading the records.

    A class that train lacks only because examples were held out or left out is a warning.

    Raises:
      UserError: there are no labels, or labels that are not integers; there is only one class; a split has examples
        without a label or with one that train lacks.
    """
    labels = {role: _labels(dataset, role, split) for role, split in dataset.splits.items()}
    for role, values in labels.items():
        _check_range(dataset, role, values)
    if len(dataset.label_names) == 1:
        hint = "; is --config.dataset.data_dir one level too high?" if dataset.name == "folder" else ""
        raise UserError(
            f"{_flag(dataset)} has only one class, {dataset.label_names[0]}; classification needs two{hint}"
        )
    # Of such labels, only a sample is known.
    if any(isinstance(split.get("label"), Column) for split in dataset.splits.values()):
        return
    if problem := _lacking(dataset, labels):
        if not dataset.is_reduced:
            raise UserError(f"{_flag(dataset)}: {problem}")
        print(f"WARNING: {problem}, since examples were held out or left out", file=sys.stderr)


def _lacking(dataset: Dataset, labels: dict[str, np.ndarray]) -> str:
    """Returns which classes train lacks, in words; "" if none."""
    known = np.unique(labels["train"])
    if len(known) == 1:
        return f"every training example has the class {_class_name(dataset, known[0])}"
    for role, values in labels.items():
        if role != "train" and len(unknown := np.setdiff1d(values, known)):
            more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
            return f"{role} has the class {_class_name(dataset, unknown[0])}{more}, but train has no example of it"
    return ""


def _flag(dataset: Dataset) -> str:
    return f"--config.dataset.name={dataset.name}"


def _class_name(dataset: Dataset, label: int) -> str:
    return dataset.label_names[label] if dataset.label_names else str(label)


def _labels(dataset: Dataset, role: str, split: Any) -> np.ndarray:
    """Returns the labels of a split, int [n], or a sample of them."""
    if "label" not in split:
        raise UserError(f"{_flag(dataset)} has no class labels, so it cannot be classified")
    labels = split["label"]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{_flag(dataset)}: label of {role} is {labels.dtype}{list(labels.shape)}; labels must be integers [n], "
            "one class number per example"
        )
    if not dataset.label_names and isinstance(split, StreamedSplit):
        raise UserError(f"{_flag(dataset)}: the number of classes is unknown: name its labels")
    if isinstance(split, StreamedSplit) and isinstance(labels, Column):
        split.require_labels()  # the others are checked when they are read
        labels = labels.sample(_SAMPLE_SIZE)
    return np.asarray(labels)


def _check_range(dataset: Dataset, role: str, labels: np.ndarray) -> None:
    largest = len(dataset.label_names) - 1
    unlabeled, unknown = np.sum(labels < 0), np.sum(labels > largest) if dataset.label_names else 0
    if unlabeled or unknown:
        problem = "no label (-1)" if unlabeled else f"a label above {largest}, the largest in train"
        hold_out = "" if role == "train" else f", or hold some out with --config.dataset.{role}_fraction=0.1"
        raise UserError(
            f"{_flag(dataset)}: {unlabeled or unknown:,} of {len(labels):,} {role} examples have {problem}; choose "
            f"another split with --config.dataset.{role}_split{hold_out}"
        )
