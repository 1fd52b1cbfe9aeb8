"""Labels that cannot be classified are refused, each with its reason."""

import numpy as np
import pytest

from research.data.sources import Dataset
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
        (("cat", "dog"), [1, 1], [1], "all examples of train have the class dog"),
        (("cat", "dog", "newt"), [0, 1], [0, 2], "the class newt of test has no examples in train"),
        (("a", "b", "c", "d"), [0, 1], [2, 3], "the class c and 1 more of test has no examples in train"),
        (("cat", "dog"), [0, -1], [0], "1 of 2 train examples have no label"),
        (("cat", "dog"), [0, 1], [2], "1 of 1 test examples have a label above 1"),
        (("cat", "dog"), [0.0, 1.0], [1.0], r"label of train is float64\[2\]; it must be integers \[n\]"),
        (("cat", "dog"), [[1, 0], [0, 1]], [[0, 1]], r"label of train is int64\[2, 2\]; it must be integers \[n\]"),
    ],
)
def test_labels_that_cannot_be_classified(names, train, test, words):
    with pytest.raises(UserError, match=f"--config.dataset.name=pets.*{words}"):
        label_checks.check(_dataset(names, train, test))


def test_a_class_that_only_train_has_is_no_error():
    label_checks.check(_dataset(("cat", "dog", "newt"), [0, 1, 2], [0]))
