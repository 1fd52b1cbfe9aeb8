"""The published recipes for ImageNet: they resolve without the data, and have the sources' numbers."""

import functools
import math

import jax
import pytest
from flax import nnx

from experiments import image_classifier
from launch.plans import lowering
from research import optimizers
from research.config import MeshConfig

IMAGES = 1_281_167
PRESETS = {name: make for name, make in image_classifier.EXPERIMENT.presets.items() if name != "default"}


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Resolves a preset for a machine that has no data sets."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def load(name, **fields):
        config = PRESETS[name]()
        for field, value in fields.items():
            setattr(config, field, value)
        return lowering.load(image_classifier.EXPERIMENT, config, MeshConfig(data=1))

    return load


# Parameters, batch size, epochs, side of the images in training and in evaluation.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet", (25_557_032, 256, 90, 224, 224)),
        pytest.param("imagenet_a3", (25_557_032, 2048, 100, 160, 224), marks=pytest.mark.slow),
        pytest.param("imagenet_lars", (25_557_032, 32_768, 90, 224, 224), marks=pytest.mark.slow),
        pytest.param("convnext", (28_589_128, 4096, 300, 224, 224), marks=pytest.mark.slow),
    ],
)
def test_every_preset_resolves_without_the_data(name, expected, load):
    workload = load(name)
    config, dataset = workload.config, workload.dataset
    model = nnx.eval_shape(lambda: workload.task.create_model(nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    sides = (dataset.train["image"].shape[1], dataset.test["image"].shape[1])
    assert (count, config.batch_size, config.num_epochs, *sides) == expected
    assert workload.num_train_steps == config.num_epochs * IMAGES // config.batch_size
    assert (dataset.num_examples, len(dataset.test["image"]), dataset.validation) == (IMAGES, 50_000, None)
    assert config.model.dtype == "bfloat16"
    assert "not run here" in PRESETS[name].__doc__.partition("\n")[0]


def test_no_preset_is_left_out():
    assert PRESETS.keys() == {"imagenet", "imagenet_a3", "imagenet_lars", "convnext"}


def _goyal(epoch, batch_size):
    """Section 2.1 and 5.1: 0.1 for 256 images, in proportion to the batch, a tenth of it at epochs 30, 60 and 80."""
    peak = 0.1 * batch_size / 256
    return peak * epoch / 5 if epoch < 5 else peak * 0.1 ** sum(epoch >= end for end in (30, 60, 80))


def _cosine(epoch, peak, warmup, epochs):
    """Loshchilov and Hutter 2017, equation 5, after a linear warm-up."""
    if epoch < warmup:
        return peak * epoch / warmup
    return peak / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def _linear(epoch):
    return 34 * epoch / 12 if epoch < 12 else 34 * (90 - epoch) / 78


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "rate"),
    [
        ("imagenet", {}, functools.partial(_goyal, batch_size=256)),
        ("imagenet", {"batch_size": 8192}, functools.partial(_goyal, batch_size=8192)),
        ("imagenet_a3", {}, functools.partial(_cosine, peak=8e-3, warmup=5, epochs=100)),
        ("imagenet_lars", {}, _linear),
        ("convnext", {}, functools.partial(_cosine, peak=4e-3, warmup=20, epochs=300)),
    ],
)
def test_the_learning_rate_follows_the_source(name, fields, rate, load):
    """In the middle of epochs; the end of the warm-up is rounded to a step."""
    workload = load(name, **fields)
    config, steps = workload.config, workload.num_train_steps
    schedule = optimizers.learning_rate(optimizers.scaled(config.optimizer, config.batch_size), steps)
    for epoch in (2.5, 4.5, 6.5, 13.5, 29.5, 30.5, 59.5, 60.5, 79.5, 80.5, 89.5):
        step = round(epoch / config.num_epochs * steps)
        in_warmup = epoch < config.optimizer.warmup * config.num_epochs
        # In the warm-up a step has the rate of its end, so that the first one is not 0.
        expected = rate((step + in_warmup) / steps * config.num_epochs)
        assert schedule(step) == pytest.approx(expected, rel=2e-3), epoch


def test_the_rest_of_the_sources_numbers():
    a3, lars, convnext, goyal = (PRESETS[name]() for name in ("imagenet_a3", "imagenet_lars", "convnext", "imagenet"))
    assert (goyal.optimizer.name, goyal.optimizer.momentum, goyal.optimizer.weight_decay) == ("nesterov", 0.9, 1e-4)
    assert (goyal.model.norm_group, goyal.label_smoothing, goyal.dataset.center_crop) == (32, 0, 0.875)
    assert (a3.optimizer.name, a3.optimizer.weight_decay, a3.loss, a3.dataset.center_crop) == (
        "lamb",
        0.02,
        "sigmoid",
        0.95,
    )
    assert (a3.augment.mixup, a3.augment.cutmix, a3.augment.randaugment, a3.augment.randaugment_magnitude) == (
        0.1,
        1.0,
        2,
        6,
    )
    assert (lars.optimizer.name, lars.optimizer.weight_decay, lars.label_smoothing) == ("lars", 1e-4, 0.1)
    assert lars.model.norm_group == 64
    assert (convnext.optimizer.name, convnext.optimizer.weight_decay, convnext.optimizer.ema_decay) == (
        "adamw",
        0.05,
        0.9999,
    )
    assert (convnext.model.drop_path, convnext.label_smoothing, convnext.augment.erasing) == (0.1, 0.1, 0.25)
    assert (convnext.augment.mixup, convnext.augment.cutmix) == (0.8, 1.0)
