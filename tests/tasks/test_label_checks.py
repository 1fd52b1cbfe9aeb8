"""Labels that cannot be classified are refused, each with its reason."""

import dataclasses

import numpy as np
import pytest

from research.data import sources
from research.data.sources import Dataset
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.tasks import label_checks


def _dataset(names, train, test):
    def split(labels):
        return {"image": np.zeros((len(labels), 2, 2, 1), np.uint8), "label": np.asarray(labels)}

    return Dataset("pets", names, split(train), None, split(test))


@pytest.mark.parametrize(
    ("names", "train", "test", "words"),
    [
        (("cat",), [0, 0], [0], "has only one class, cat; classification needs two"),
        (("cat", "dog"), [1, 1], [1], "every training example has the class dog"),
        (("cat", "dog", "newt"), [0, 1], [0, 2], "test has the class newt, but train has no example of it"),
        (("a", "b", "c", "d"), [0, 1], [2, 3], "test has the class c and 1 more, but train has no example of it"),
        (("cat", "dog"), [0, -1], [0], "1 of 2 train examples have no label"),
        (("cat", "dog"), [0, 1], [2], "1 of 1 test examples have a label above 1"),
        (("cat", "dog"), [0.0, 1.0], [1.0], r"label of train is float64\[2\]; labels must be integers \[n\]"),
        (("cat", "dog"), [[1, 0], [0, 1]], [[0, 1]], r"label of train is int64\[2, 2\]; labels must be integers \[n\]"),
    ],
)
def test_labels_that_cannot_be_classified(names, train, test, words):
    with pytest.raises(UserError, match=f"--config.dataset.name=pets.*{words}"):
        label_checks.check(_dataset(names, train, test))


def test_a_class_that_only_train_has_is_no_error():
    label_checks.check(_dataset(("cat", "dog", "newt"), [0, 1, 2], [0]))


def test_a_class_that_was_held_out_completely_is_a_warning(capsys):
    label_checks.check(dataclasses.replace(_dataset(("cat", "dog", "newt"), [0, 1], [0, 2]), is_reduced=True))
    warning = (
        "WARNING: test has the class newt, but train has no example of it, since examples were held out or left out"
    )
    assert capsys.readouterr().err == f"{warning}\n"


@pytest.mark.parametrize("changes", [{"train_fraction": 0.5}, {"test_fraction": 0.5}, {"validation_fraction": 0.5}, {}])
def test_whether_examples_were_held_out_is_known(changes):
    arrays = {"image": np.zeros((8, 2, 2, 1), np.uint8), "label": np.arange(8) % 2}
    dataset = sources.load(
        DatasetConfig(name="own", **changes), {"own": lambda _: (("a", "b"), {"train": arrays, "test": arrays})}
    )
    assert dataset.is_reduced == bool(changes)


def test_labels_that_are_not_integers_are_named_after_loading():
    arrays = {"image": np.zeros((4, 2, 2, 1), np.uint8), "label": np.array([0.0, 1.0, 0.0, 1.0])}
    dataset = sources.load(DatasetConfig(name="own"), {"own": lambda _: ((), {"train": arrays, "test": arrays})})
    with pytest.raises(UserError, match="label of train is float32"):
        label_checks.check(dataset)
