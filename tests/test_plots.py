"""The plots show the values that they are given."""

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
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["ant, bee (0.70)", "bee, ant (0.40)"]
    assert [int(image.get_array()[0, 0, 0]) for image in axes.images] == [3, 1]
    for text, image in zip(axes.texts, axes.images, strict=True):  # each above its own
        left, right, _, top = image.get_extent()
        assert left < text.get_position()[0] < right
        assert top < text.get_position()[1] < top + 0.1
    assert axes.images[0].get_extent()[1] < axes.images[1].get_extent()[0]
    low, high = axes.get_ylim()
    assert high - low < 2  # no empty rows


def test_a_grid_has_the_images_row_by_row_with_white_between():
    images = np.linspace(0.1, 0.6, 3)[:, None, None, None] * np.ones((1, 2, 3, 1))
    (axes,) = plots.image_grid(images, 2, "three").axes
    shown = axes.images[0].get_array()
    expected = np.ones((5, 7))
    expected[:2, :3], expected[:2, 4:], expected[3:, :3] = 0.1, 0.35, 0.6
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    assert axes.get_title() == "three"
    colors = plots.image_grid(np.full((1, 2, 2, 3), [0.1, 0.2, 0.3]), 1, "").axes[0].images[0].get_array()
    np.testing.assert_allclose(colors[0, 0], [0.1, 0.2, 0.3], rtol=1e-6)


def test_a_scatter_has_each_label_at_its_points():
    points = np.arange(8.0).reshape(4, 2)
    (axes,) = plots.scatter(points, np.array([1, 0, 1, 2]), NAMES, "where").axes
    offsets = [np.asarray(part.get_offsets()) for part in axes.collections]
    for got, rows in zip(offsets, ([1], [0, 2], [3])):
        np.testing.assert_array_equal(got, points[rows])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(NAMES)
