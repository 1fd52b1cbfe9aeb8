"""Classification of images that are read one pixel at a time."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import sequential_images
from research import app, optimizers, sharding
from research.config import DatasetConfig, MeshConfig, RecurrentConfig
from research.data.sources import Dataset
from research.data.streamed import StreamedSplit
from research.errors import UserError
from research.models.sequence_classifier import SequenceClassifier, fixed_permutation
from research.training import loop

_RANDOM = np.random.default_rng(0)


def _classifier(name="simple", permutation=None, **fields):
    config = RecurrentConfig(**{"name": name, "width": 6, "layers": 2, **fields})
    return SequenceClassifier(config, 2, 3, permutation, nnx.Rngs(0))


def _logits(model, images):
    return np.asarray(jax.jit(lambda x: model(x, train=False))(images))


def test_logits_equal_those_of_a_loop_in_float64():
    """Two layers of Elman's cell, over pixels in row order, averaged over time."""
    model, images = _classifier(), _RANDOM.normal(size=(4, 3, 5, 2))
    x = images.reshape(4, 15, 2) @ np.float64(model.pixel.kernel[...]) + np.float64(model.pixel.bias[...])
    for layer in model.layers:
        inputs, hidden, outputs = x @ np.float64(layer.inputs.kernel[...]), np.zeros((4, 6)), []
        for step in range(15):
            hidden = np.tanh(inputs[:, step] + hidden @ np.float64(layer.kernel[...]) + np.float64(layer.bias[...]))
            outputs.append(hidden)
        x = np.stack(outputs, 1)
    expected = x.mean(1) @ np.float64(model.classify.kernel[...]) + np.float64(model.classify.bias[...])
    np.testing.assert_allclose(_logits(model, images.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("simple", marks=pytest.mark.slow), "lstm", "lru"])
def test_a_permuted_network_reads_the_pixels_in_that_order(name):
    order, images = fixed_permutation(12), _RANDOM.normal(size=(2, 3, 4, 2)).astype(np.float32)
    reordered = images.reshape(2, 12, 2)[:, order].reshape(images.shape)
    expected = _logits(_classifier(name), reordered)
    np.testing.assert_allclose(_logits(_classifier(name, order), images), expected, rtol=1e-6)
    assert np.abs(_logits(_classifier(name), images) - expected).max() > 1e-3


def test_the_permutation_is_the_same_in_every_run():
    assert fixed_permutation(784)[:6].tolist() == [693, 85, 647, 392, 765, 14]
    assert sorted(fixed_permutation(784)) == list(range(784))


def test_an_lstm_has_the_parameters_of_its_formula():
    model = _classifier("lstm", width=8, layers=2)
    cell = 8 * 4 * 8 + 8 * 4 * 8 + 4 * 8
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == 2 * 8 + 8 + 2 * cell + 8 * 3 + 3


def test_dropout_is_applied_in_training():
    model, images = _classifier("lstm", dropout=0.5), _RANDOM.normal(size=(2, 3, 4, 2)).astype(np.float32)
    dropped = [model(images, train=True, key=jax.random.key(seed)) for seed in (0, 1)]
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3


def _dataset(shape, split_type=dict):
    split = split_type(image=_RANDOM.integers(0, 256, shape, dtype=np.uint8), label=np.arange(shape[0]) % 3)
    return Dataset("drawn", ("a", "b", "c"), split, None, split)


def test_colors_become_the_gray_values_of_pil():
    dataset = _dataset((6, 8, 8, 3))
    gray = sequential_images.prepare(sequential_images.get_config(), dataset)
    for image, color in zip(gray.test["image"], dataset.test["image"]):
        assert image.shape == (8, 8, 1)
        difference = image[..., 0].astype(int) - np.asarray(Image.fromarray(color).convert("L"))
        assert np.abs(difference).max() <= 1  # PIL rounds its weights to 16 bits
    np.testing.assert_array_equal(gray.train["label"], dataset.train["label"])


class _Streamed(StreamedSplit):
    """Arrays in place of records."""

    def __init__(self, **arrays):
        self._arrays = arrays

    def __getitem__(self, name):
        return self._arrays[name]

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)


def test_data_that_cannot_be_read_pixel_by_pixel_is_an_error():
    config = sequential_images.get_config()
    with pytest.raises(UserError, match="decoded when they are needed"):
        sequential_images.prepare(config, _dataset((6, 8, 8, 3), _Streamed))
    with pytest.raises(UserError, match="no images to classify"):
        sequential_images.prepare(config, Dataset("t", (), {"text": np.zeros(4)}, None, {"text": np.zeros(4)}))


def _train(workdir, axes):
    """Learns which half of a 4 x 4 image is bright; returns the summary."""
    label = np.arange(64) % 2
    image = np.random.default_rng(1).integers(0, 100, (64, 4, 4, 1), dtype=np.uint8)
    image[label == 0, :2] += 150
    image[label == 1, 2:] += 150
    split = {"image": image, "label": label}
    dataset = Dataset("drawn", ("top", "bottom"), split, None, split)
    config = sequential_images.get_config()
    config.num_epochs, config.batch_size, config.mesh = 12, 8, MeshConfig(**axes)
    config.model = RecurrentConfig(name="lru", width=8, layers=1)
    config.optimizer = optimizers.resolve(dataclasses.replace(config.optimizer, learning_rate=0.02))
    task = sequential_images.make_task(config, dataset)
    mesh = sharding.make_mesh(config, jax.devices()[: math.prod(axes.values())])
    return loop.train_and_evaluate("sequential_images", config, task, dataset, mesh, workdir)[1]


@pytest.mark.slow
def test_it_learns_the_same_with_the_pixels_over_four_devices(tmp_path):
    summaries = []
    for number, axes in enumerate(({"data": 1}, {"data": 2, "sequence": 4})):
        (tmp_path / str(number)).mkdir()
        summaries.append(_train(tmp_path / str(number), axes))
    assert summaries[0]["test_accuracy"] > 0.9
    assert summaries[0]["test_loss"] == pytest.approx(summaries[1]["test_loss"], rel=1e-3)


@pytest.mark.slow
def test_the_command_evaluates_the_permutation_that_it_trained_with(tmp_path):
    args = [f"--workdir={tmp_path}", "--config=permuted", "--config.dataset.name=digits", "--config.model.width=8"]
    less = ["--config.dataset.train_fraction=0.1", "--config.num_epochs=1", "--config.model.layers=1"]
    summary = app.run(sequential_images.EXPERIMENT, [*args, *less])
    evaluated = app.run(sequential_images.EXPERIMENT, [f"--workdir={tmp_path}", "--mode=eval"])
    assert evaluated["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-5)


def test_a_sequential_cell_cannot_share_the_pixels_among_devices():
    config = sequential_images.get_config()
    config.model.name, config.mesh.sequence = "lstm", 2
    with pytest.raises(UserError, match="lstm is not parallel over time"):
        sequential_images.complete(config, _dataset((6, 8, 8, 1)))


def test_pixels_that_the_devices_cannot_share_evenly_are_an_error():
    config = sequential_images.get_config()
    config.mesh.sequence = 3
    with pytest.raises(UserError, match="64 pixels cannot be split evenly over the 3 devices"):
        sequential_images.complete(config, _dataset((6, 8, 8, 1)))


def test_the_structure_of_a_network_is_hashable():
    """Otherwise it could not be a static argument of `jax.jit`."""
    graphdefs = [nnx.graphdef(_classifier("lru", fixed_permutation(12))) for _ in range(2)]
    assert hash(graphdefs[0]) == hash(graphdefs[1])


def test_every_preset_names_its_data():
    names = {name: preset().dataset for name, preset in sequential_images.EXPERIMENT.presets.items()}
    mnist = DatasetConfig(name="mnist|digits")
    assert names == {"default": mnist, "permuted": mnist, "cifar10": DatasetConfig(name="cifar10")}
