"""The losses of classification against NumPy, for whole and mixed labels."""

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import AugmentConfig
from research.data import augmentation
from research.data.batch import Batch
from research.data.mixing import MixedLabels
from research.tasks import calibration, class_table, classification_loss
from research.tasks.classification import Classification

COUNT, CLASSES = 6, 12
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(COUNT, CLASSES)).astype(np.float32)
FIRST, SECOND = RNG.integers(0, CLASSES, (2, COUNT))
WEIGHT = np.array([1.0, 0.9, 0.7, 0.5, 0.15, 0.0], np.float32)
MIXED = MixedLabels(jnp.array(FIRST), jnp.array(SECOND), jnp.array(WEIGHT))


def _timms_target(smoothing, mixed):
    """`mixup_target` of timm: smoothed one-hot labels, weighted."""
    off = smoothing / CLASSES
    first, second = (np.where(np.eye(CLASSES)[labels] == 1, 1 - smoothing + off, off) for labels in (FIRST, SECOND))
    return WEIGHT[:, None] * first + (1 - WEIGHT[:, None]) * second if mixed else first


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_softmax_loss_is_the_cross_entropy_of_timms_targets(smoothing, mixed):
    loss = classification_loss.softmax(jnp.array(LOGITS), MIXED if mixed else jnp.array(FIRST), smoothing)
    log_p = np.float64(LOGITS) - np.log(np.exp(np.float64(LOGITS)).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, -(_timms_target(smoothing, mixed) * log_p).sum(1), rtol=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("smoothing", "threshold"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2)])
def test_the_sigmoid_loss_is_the_binary_cross_entropy_of_timms_targets(smoothing, threshold, mixed):
    loss = classification_loss.sigmoid(jnp.array(LOGITS), MIXED if mixed else jnp.array(FIRST), smoothing, threshold)
    target = _timms_target(smoothing, mixed)
    target = target > threshold if threshold else target
    p = 1 / (1 + np.exp(-np.float64(LOGITS)))
    np.testing.assert_allclose(loss, -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean(1), rtol=1e-5)


def test_the_accuracy_of_mixed_images_is_the_weight_of_the_predicted_class():
    logits = jnp.array(np.eye(CLASSES)[FIRST])
    same = FIRST == SECOND
    np.testing.assert_allclose(classification_loss.accuracy(logits, MIXED), np.where(same, 1, WEIGHT), atol=1e-6)
    np.testing.assert_array_equal(classification_loss.accuracy(logits, jnp.array(FIRST)), 1)


IMAGES = RNG.integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
BATCH = Batch({"image": IMAGES, "label": jnp.array(FIRST)}, jnp.arange(COUNT), epoch=jnp.zeros(COUNT, jnp.int32))
KERNEL = jnp.array(RNG.normal(size=(48, CLASSES)))


def _model(images, *, train, key=None):
    return images.reshape(len(images), -1) @ KERNEL


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_training_mixes_images_with_their_labels_and_evaluation_does_not(loss):
    augment = AugmentConfig(mixup=1.0, cutmix=1.0)
    task = Classification(None, (0.5,) * 3, (0.25,) * 3, augment, 0.1, loss=loss)  # pyright: ignore
    key = jax.random.key(0)
    values = task.evaluate(_model, BATCH, key=key, train=True)  # pyright: ignore
    images, labels = augmentation.augment(BATCH, jax.random.split(key)[0], augment, task.mean, task.std)
    logits = _model(images, train=True)
    options = (0.1,) if loss == "softmax" else (0.1, 0.0)
    expected = getattr(classification_loss, loss)(logits, labels, *options)
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    assert ((values["accuracy"] >= 0) & (values["accuracy"] <= 1)).all()

    values = task.evaluate(_model, BATCH, key=key, train=False)  # pyright: ignore
    logits = np.float64(_model((IMAGES / 255 - 0.5) / 0.25, train=False))
    cross_entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(COUNT), FIRST]
    np.testing.assert_allclose(values["loss"], cross_entropy, rtol=1e-4)
    np.testing.assert_array_equal(values["accuracy"], logits.argmax(1) == FIRST)


def test_the_strengths_of_a_step_replace_those_of_the_task():
    task = Classification(None, (0.5,), (0.25,), AugmentConfig(mixup=1.0, erasing=0.5, crop=2), 0.1)  # pyright: ignore
    replaced = task.with_hparams({"augment.mixup": 0.3, "optimizer.beta": 1.0})
    assert replaced.augment == AugmentConfig(mixup=0.3, erasing=0.5, crop=2)
    assert replaced.label_smoothing == 0.1


def _evaluated(count=200):
    """An evaluation in unequal batches: the means, and the probabilities in NumPy."""
    logits = RNG.normal(size=(count, CLASSES)).astype(np.float32) * 3
    labels = np.where(RNG.random(count) < 0.5, logits.argmax(1), RNG.integers(0, CLASSES, count))
    task = Classification(None, (0.0,), (1 / 255,), AugmentConfig())  # pyright: ignore
    sums, start = {}, 0
    for size in (7, 64, count - 71):
        rows = slice(start, start + size)
        batch = Batch(
            {"image": logits[rows, None, None].transpose(0, 1, 3, 2), "label": labels[rows]}, jnp.arange(size)
        )
        values = task.evaluate(lambda x, **_: x[:, 0, :, 0], batch, key=jax.random.key(0), train=False)  # pyright: ignore
        for name in values.keys() - set(task.per_example):
            sums[name] = sums.get(name, 0) + np.float64(values[name]).sum(0)
        start += size
    exact = np.exp(np.float64(logits))
    return task.split_metrics("test", sums, count), exact / exact.sum(1, keepdims=True), labels


def test_calibration_and_top5_are_those_of_all_examples():
    """Against NumPy, bin by bin as Guo et al. define it, and scikit-learn."""
    metrics = pytest.importorskip("sklearn.metrics")
    got, probabilities, labels = _evaluated()
    confidences, correct = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for i in range(15):
        inside = (confidences > i / 15) & (confidences <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    assert error > 0.05
    np.testing.assert_allclose(got["test_calibration_error"], error, rtol=1e-4)
    top5 = metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=range(CLASSES))
    np.testing.assert_allclose(got["test_top5_accuracy"], top5, rtol=1e-6)
    np.testing.assert_allclose(got["test_accuracy"], correct.mean(), rtol=1e-6)
    assert got.keys() == {f"test_{name}" for name in ("loss", "accuracy", "top5_accuracy", "calibration_error")}


def test_a_bin_has_its_upper_edge():
    bins = calibration.excess_confidence(jnp.array([1e-9, 0.5 / 15, 1.0]), jnp.zeros(3))
    assert [int(np.flatnonzero(row)[0]) for row in np.asarray(bins)] == [0, 0, 14]


def test_ten_classes_have_no_top5_accuracy():
    task = Classification(None, (0.0,), (1 / 255,), AugmentConfig())  # pyright: ignore
    batch = Batch({"image": np.ones((2, 1, 10, 1)), "label": np.array([0, 9])}, jnp.arange(2))
    values = task.evaluate(lambda x, **_: x[:, 0, :, 0], batch, key=jax.random.key(0), train=False)  # pyright: ignore
    assert "top5_accuracy" not in values


def test_the_table_of_classes_counts_as_scikit_learn_does():
    metrics = pytest.importorskip("sklearn.metrics")
    names = ["ant", 'a "bee", or two', "cow", "nothing"]
    labels, predictions = RNG.integers(0, 3, (2, 100))
    in_top5 = (predictions == labels) | (RNG.random(100) < 0.5)
    rows = list(csv.DictReader(io.StringIO(class_table.make(labels, predictions, in_top5, names))))
    matrix = metrics.confusion_matrix(labels, predictions, labels=range(4))
    assert [row["class"] for row in rows] == names
    for label, row in enumerate(rows[:3]):
        others = matrix[label].copy()
        assert int(row["examples"]) == others.sum()
        assert float(row["accuracy"]) == pytest.approx(others[label] / others.sum(), abs=1e-6)
        assert float(row["top5_accuracy"]) == pytest.approx(in_top5[labels == label].mean(), abs=1e-6)
        others[label] = 0
        assert int(row["mistakes"]) == others.max() == others[names.index(row["most_confused_with"])]
    assert list(rows[3].values()) == ["nothing", "0", "", "", "", ""]
    assert "top5" not in class_table.make(labels, labels, None, names)
    assert class_table.make(labels, labels, None, names).splitlines()[1] == f"ant,{(labels == 0).sum()},1.0,,"
