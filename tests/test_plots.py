"""The pictures of a classifier show what they say."""

import numpy as np

from research import plots

NAMES = ("ant", "bee", "cow")


def test_confusion_counts_labels_in_rows_and_predictions_in_columns():
    labels, predictions = np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 2])
    (axes,) = plots.confusion(labels, predictions, NAMES).axes
    counts = {text.get_position()[::-1]: int(text.get_text()) for text in axes.texts}
    expected = np.zeros((3, 3), int)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[2, 2] = 1, 2, 1, 1
    assert counts == {place: int(count) for place, count in np.ndenumerate(expected)}
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_title()) == ("label", "predicted", "accuracy 0.6000")
    np.testing.assert_allclose(axes.images[0].get_array()[0], [1 / 3, 2 / 3, 0])


def test_the_most_confident_mistakes_come_first():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 5, 5, 3), np.uint8)
    labels = np.array([0, 1, 2, 0])
    probabilities = np.array([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.0, 0.2, 0.8], [0.1, 0.7, 0.2]])
    figure = plots.mistakes(images, labels, probabilities, NAMES)
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["ant, bee (0.70)", "bee, ant (0.40)"]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [3, 1]
