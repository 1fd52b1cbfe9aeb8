"""The plots show the values that they are given, for any number and any names; none fails a command."""

import io
import itertools
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from research import plots
from research.process.signals import StoppedError
from research.record import drawing
from research.tasks import vae

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
    predicted = probabilities.argmax(-1), probabilities.max(-1)
    shown = plots.most_confident_mistakes(labels, *predicted)
    (axes,) = plots.mistakes(images[shown], shown, labels, *predicted, NAMES).axes
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


def test_more_classes_than_a_matrix_shows_have_their_most_frequent_mistakes():
    labels = np.repeat(np.arange(40), 10)
    predictions = labels.copy()
    predictions[30:37], predictions[50:53] = 4, 39  # 7 of class 3, 3 of class 5
    names = [f"class {i}" for i in range(40)]
    (axes,) = plots.confusion(labels, predictions, names).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["class 3 -> class 4", "class 5 -> class 39"]
    assert [bar.get_width() for bar in axes.patches] == [7, 3]
    assert [text.get_text() for text in axes.texts] == ["7 (70%)", "3 (30%)"]
    top, bottom = (bar.get_y() for bar in axes.patches)
    assert axes.transData.transform((0, top))[1] > axes.transData.transform((0, bottom))[1]  # most frequent at the top
    assert axes.get_title().startswith("accuracy 0.9750")
    assert not plots.confusion(labels, labels, names).axes[0].patches


def test_reliability_has_the_accuracy_of_each_bin():
    """Confidences of 0.2 (an upper edge), 0.25, 0.9 and 1.0, in five bins."""
    confidences = np.array([0.2, 0.25, 0.9, 0.95, 1.0, 1.0])
    correct = np.array([False, True, True, False, True, True])
    upper, lower = plots.reliability(confidences, correct, 5).axes
    np.testing.assert_allclose([bar.get_height() for bar in upper.patches], [0, 1, 0, 0, 0.75])
    assert [bar.get_height() for bar in lower.patches] == [1, 1, 0, 0, 4]
    error = (0.2 * 1 + 0.75 * 1 + abs(0.75 - 0.9625) * 4) / 6
    assert upper.get_title() == f"expected calibration error {error:.4f}"


LONG = "a class with a very long name, longer than any plot is wide: " * 20
RNG = np.random.default_rng(0)


def _labels(count, classes):
    return RNG.integers(0, classes, count)


def _epochs(count):
    names = [f"{split}_{metric}" for split in ("train", "validation", "test") for metric in ("loss", "accuracy")]
    return [{"epoch": epoch} | dict.fromkeys(names, 0.5) for epoch in range(1, count + 1)]


LARGE = {
    "a matrix": lambda: plots.confusion(_labels(999, 30), _labels(999, 30), [LONG] * 30),
    "1,000 classes": lambda: plots.confusion(_labels(9999, 1000), _labels(9999, 1000), [LONG] * 1000),
    "a million classes": lambda: plots.confusion(_labels(999, 10**6), _labels(999, 10**6), ["x"] * 10**6),
    "large photos": lambda: plots.mistakes(
        np.zeros((25, 3000, 20, 3), np.uint8),
        np.arange(25),
        np.zeros(25, int),
        np.ones(25, int),
        np.ones(25),
        [LONG] * 2,
    ),
    "high images": lambda: plots.image_grid(np.zeros((4, 9000, 1, 1)), 4, "high"),
    "many images": lambda: plots.image_grid(np.zeros((10_000, 28, 28, 1)), 100, "many"),
    "1,000 labels": lambda: plots.scatter(RNG.normal(size=(99_999, 2)), _labels(99_999, 1000), [LONG] * 1000, "x"),
    "30 labels": lambda: plots.scatter(RNG.normal(size=(999, 2)), _labels(999, 30), [LONG] * 30, "x"),
    "100 runs": lambda: plots.curves({f"{i} {LONG}": _epochs(3) for i in range(100)}),
    "100,000 epochs": lambda: plots.curves({"x": _epochs(100_000)}),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_plot_is_bounded_and_legible_for_any_input(name):
    figure = LARGE[name]()
    with Image.open(io.BytesIO(drawing.png(figure))) as plot:
        assert max(plot.size) <= 2400
    for axes in (axes for axes in figure.axes if axes.get_label() != "<colorbar>"):
        artists = [*axes.lines, *axes.images, *axes.collections, *axes.patches]
        assert len(artists) <= 30 * 30
        assert all(np.size(image.get_array()) <= 2400 * 2400 * 3 for image in axes.images)
        assert all(len(line.get_xdata()) <= 2000 for line in axes.lines)
        assert all(len(dots.get_offsets()) <= 20_000 for dots in axes.collections)
        size = axes.get_window_extent().size
        side = min(size) if axes.get_aspect() == "auto" else max(size)
        assert side > 0.2 * min(figure.bbox.size)  # the names leave room for the data
        texts = [text for text in axes.get_yticklabels() if text.get_text()]
        extents = sorted((text.get_window_extent() for text in texts), key=lambda extent: extent.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(extents))  # none covers another


def test_a_long_line_keeps_its_last_point():
    (axes,) = plots.curves({"x": [{"epoch": i, "train_loss": float(-i)} for i in range(1, 5002)]}).axes
    assert tuple(axes.lines[0].get_xydata()[-1]) == (5001, -5001)


NAMES_THAT_ARE_NOT_TEXT = {
    "$x$ $y": "$x$ $y",  # mathematics, else
    r"\frac$\frac$": r"\frac$\frac$",
    "two\nlines\t\x00\x85": r"two\nlines\t\x00\x85",
    "Wörterbuch, ключ": "Wörterbuch, ключ",
    "\u72ac \U0001f415 \udc80": r"\u72ac \U0001f415 \udc80",
    "_hidden from legends": " _hidden from legends",
    "": " ",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES_THAT_ARE_NOT_TEXT)
def test_names_are_shown_as_they_are(name, monkeypatch):
    """In all plots, without a warning (which would be an error here) about a glyph or a label."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.backends.backend_agg.RendererAgg.draw_text",
        lambda self, gc, x, y, text, *_, ismath=False, **__: drawn.append((text, ismath)),
    )
    names, labels, predictions = [name] * 40, np.arange(6) % 2, np.array([0, 0, 0, 0, 0, 1])
    for figure in (
        plots.confusion(labels, predictions, names[:2]),
        plots.confusion(labels, predictions, names),
        plots.mistakes(np.zeros((6, 2, 2, 1), np.uint8), np.arange(6), labels, predictions, np.ones(6), names[:2]),
        plots.scatter(np.zeros((6, 2)), labels, names[:2], ""),
        plots.curves({name: _epochs(1), "other": _epochs(1)}),
    ):
        drawn.clear()
        drawing.png(figure)
        assert not any(ismath for _, ismath in drawn)
        assert any(NAMES_THAT_ARE_NOT_TEXT[name] in text for text, _ in drawn)


def test_long_text_loses_its_middle():
    assert drawing.literal("0123456789", 10) == "0123456789"
    assert drawing.literal("0123456789x", 10) == "0123…6789x"


def test_a_failure_is_a_warning(tmp_path, capsys):
    def fail():
        raise MemoryError("too large")

    path = tmp_path / "plot.png"
    assert drawing.save(path, fail) is None
    assert capsys.readouterr().err == "WARNING: plot.png was not drawn: too large\n"
    assert drawing.save(tmp_path / "nowhere/plot.png", lambda: drawing.figure(1, 1)) is None
    assert "WARNING: plot.png was not drawn: " in capsys.readouterr().err
    assert drawing.save(path, lambda: drawing.figure(1, 1)) == path.read_bytes()


def test_a_stop_signal_while_drawing_stops(tmp_path):
    def stop():
        raise StoppedError("stopped by SIGTERM", signal.SIGTERM)

    with pytest.raises(StoppedError):
        drawing.save(tmp_path / "plot.png", stop)


@pytest.mark.slow
def test_plots_need_no_backend(env, tmp_path):
    """Nor does the page of a sweep."""
    program = """
from research.record import drawing
from research.tasks import vae
drawing.save(Path("x.png"), lambda: drawing.figure(1, 1))
drawing.import_matplotlib()
if importlib.util.find_spec("optuna"):
    from optuna import visualization
"""
    command = [sys.executable, "-c", f"import importlib.util\nfrom pathlib import Path\n{program}"]
    done = subprocess.run(command, env=env | {"MPLBACKEND": "nonsense"}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").exists()


def test_a_large_test_set_is_plotted_in_part(monkeypatch):
    """The autoencoder's inputs are float32 images: those of a whole test set may not fit in memory."""
    monkeypatch.setattr(vae, "_MAX_PLOTTED_PIXELS", 40)
    task = vae.VAE(lambda _: None, (2, 2, 1), "bernoulli", "fixed")  # pyright: ignore
    encoded = []

    def predict(function, arrays):
        count = len(next(iter(arrays.values())))
        if function != task.encoded:
            return np.zeros((count, 2, 2, 1))
        encoded.append(count)
        return np.zeros((count, 2, 2, 1)), np.zeros((count, 2))

    test = {"image": np.zeros((200, 2, 2, 1), np.uint8), "label": np.zeros(200, int)}
    plots = task.plots(predict, SimpleNamespace(test=test, label_names=["a"]))  # pyright: ignore
    assert encoded == [60]  # 50 for the reconstructions, 10 of 4 pixels
    assert len(plots["latents"]().axes[0].collections[0].get_offsets()) == 60
