"""Chooses the splits of a data set that are trained on, validated on and tested on, and holds out examples."""

import itertools
from collections.abc import Sequence

import numpy as np

from research import randomness
from research.data.cache import Arrays
from research.data.source import Source, Subset, held_out
from research.data.tfds_records import MOST_CLASSES
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.randomness import Stream

Examples = Arrays | Source


def choose(name: str, config: DatasetConfig, present: Sequence[str]) -> dict[str, str]:
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


def number_classes(splits: dict[str, Examples]) -> tuple[str, ...]:
    """Returns the names of integer labels, "0" to the largest in train; removes labels that are not class numbers.

    Without labels, or if they are known only after reading all records, there are no names.
    """
    train = splits["train"]
    labels = train.labels if isinstance(train, Source) else train.get("label")
    if labels is None or not np.issubdtype(labels.dtype, np.integer):
        return ()
    largest = labels.max()
    if 0 <= largest < MOST_CLASSES:
        return tuple(map(str, range(largest + 1)))
    for split in splits.values():
        if not isinstance(split, Source):
            split.pop("label", None)
    return ()


def num_examples(split: Examples) -> int:
    """Returns the number of examples of a split; of a text, the number of bytes or tokens."""
    return len(split) if isinstance(split, Source) else len(next(iter(split.values())))


def hold_out(train: Examples, fraction: float, role: str) -> tuple[Examples, Examples]:
    """Splits train into (train, `role`): a fixed random subset of examples, or the end of a text.

    Whether a record of a source with keys is held out depends on its key only.

    Raises:
      UserError: one of the two would be empty.
    """
    if not isinstance(train, Source) and "text" in train:
        text = train["text"]
        number = round(fraction * len(text))
        _check_parts(role, fraction, len(text), number)
        return {"text": text[:-number]}, {"text": text[-number:]}
    is_held_out = _draw(train, Stream.HOLD_OUT if role == "validation" else Stream.HOLD_OUT_TEST, fraction)
    _check_parts(role, fraction, len(is_held_out), int(is_held_out.sum()))
    return _part(train, ~is_held_out), _part(train, is_held_out)


def _check_parts(role: str, fraction: float, count: int, number: int) -> None:
    """Raises `UserError` if all or none of `count` examples are held out."""
    if not 0 < number < count:
        raise UserError(
            f"--config.dataset.{role}_fraction={fraction} leaves {count - number} examples to train on and {number} to "
            f"{'validate' if role == 'validation' else role} on"
        )


def subset(train: Examples, fraction: float) -> Examples:
    """Returns a fixed random subset of the examples, or the beginning of a text; smaller fractions are nested in it.

    Raises:
      UserError: it would be empty.
    """
    if not isinstance(train, Source) and "text" in train:
        if number := round(fraction * num_examples(train)):
            return {"text": train["text"][:number]}
    elif (is_kept := _draw(train, Stream.TRAIN_FRACTION, fraction)).any():
        return _part(train, is_kept)
    raise UserError(f"--config.dataset.train_fraction={fraction} leaves none of {num_examples(train)} examples")


def _draw(split: Examples, stream: Stream, fraction: float) -> np.ndarray:
    """Draws a fixed random part of the examples: bool [n]."""
    keys = split.keys() if isinstance(split, Source) else None
    if keys is not None:
        return held_out(keys, fraction, bytes([stream]))
    is_drawn = np.zeros(num_examples(split), bool)
    is_drawn[randomness.generator(stream).permutation(len(is_drawn))[: round(fraction * len(is_drawn))]] = True
    return is_drawn


def _part(split: Examples, is_part: np.ndarray) -> Examples:
    if isinstance(split, Source):
        return Subset(split, np.flatnonzero(is_part))
    return {name: array[is_part] for name, array in split.items()}
