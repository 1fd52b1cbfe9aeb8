"""The losses of classification against NumPy, for whole and mixed labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import AugmentConfig
from research.data import augmentation
from research.data.batch import Batch
from research.data.mixing import MixedLabels
from research.tasks import classification_loss
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
