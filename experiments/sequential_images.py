"""Recurrent networks that read images one pixel at a time: how far back does a cell remember?

python -m experiments.sequential_images                        MNIST, 784 steps, with the linear recurrent unit
python -m experiments.sequential_images --config=permuted      its pixels in a fixed random order
python -m experiments.sequential_images --config=cifar10       grayscale CIFAR-10, 1,024 steps
python -m experiments.sequential_images --config.model.name=mingru      also lstm, gru and simple

The first reaches 98.74% on MNIST's test split, the second 93.88% (one run each, 4 epochs, 50 minutes of training on one
x86 CPU core with AVX2, shared with other work).

Le et al. 2015 (arXiv 1504.00941) introduced the first two, Long Range Arena (Tay et al. 2021, arXiv 2011.04006) the
third, for which it turns the colors into gray.
"""

import dataclasses

import numpy as np
from flax import nnx

from research import app
from research.config import DatasetConfig, OptimizerConfig, RecurrentConfig, option
from research.data import images
from research.data.sources import Dataset
from research.data.streamed import StreamedSplit
from research.errors import UserError
from research.models import rnn
from research.models.sequence_classifier import SequenceClassifier, fixed_permutation
from research.parametrization import Network
from research.tasks import classification
from research.tasks.classification import Classification, ClassificationConfig

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as TensorFlow's and PIL's grayscale


@dataclasses.dataclass
class SequentialImagesConfig(ClassificationConfig):
    """Image classification by a recurrent network."""

    permuted: bool = option(False, "read the pixels in a random order, the same for all images and runs")
    model: RecurrentConfig = dataclasses.field(default_factory=RecurrentConfig)


def get_config() -> SequentialImagesConfig:
    """Three LRU layers on MNIST."""
    return SequentialImagesConfig(
        num_epochs=4,
        batch_size=32,
        dataset=DatasetConfig(name="mnist|digits"),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=0.004, weight_decay=0.05, schedule="cosine", warmup=0.1, clip_norm=1.0
        ),
        model=RecurrentConfig(name="lru", width=64, layers=3),
    )


def permuted() -> SequentialImagesConfig:
    """The same network on permuted MNIST."""
    return dataclasses.replace(get_config(), permuted=True)


def cifar10() -> SequentialImagesConfig:
    """Four LRU layers of 128 units on grayscale CIFAR-10."""
    config = get_config()
    config.num_epochs = 10
    config.dataset = DatasetConfig(name="cifar10")
    config.model = RecurrentConfig(name="lru", width=128, layers=4, dropout=0.1)
    return config


def prepare(config: SequentialImagesConfig, dataset: Dataset) -> Dataset:
    """Converts color images to gray values.

    Raises:
      UserError: the data set has no images, or they are in color and are read only when they are needed.
    """
    if "image" not in dataset.train:
        raise UserError(f"--config.dataset.name={dataset.name} has no images to classify: use mnist, cifar10 or digits")
    if dataset.train["image"].shape[-1] == 1:
        return dataset
    if isinstance(dataset.train, StreamedSplit):
        raise UserError(
            f"--config.dataset.name={dataset.name} has color images that are decoded when they are needed: this "
            "experiment can only convert sets of one size, without --config.dataset.image_size"
        )
    gray = {role: {**split, "image": _gray(split["image"])} for role, split in dataset.splits.items()}
    return dataclasses.replace(dataset, **gray)


def _gray(colors: np.ndarray) -> np.ndarray:
    """Converts uint8 [n, h, w, 3] to uint8 [n, h, w, 1]."""
    # One image at a time: the floats of all would take eight times the memory of the set.
    return np.stack([np.rint(image @ _LUMA).astype(np.uint8) for image in colors])[..., None]


def complete(config: SequentialImagesConfig, dataset: Dataset) -> SequentialImagesConfig:
    """Returns the config after checking it against the data set.

    Raises:
      UserError: the augmentation does not fit the images, or the mesh cannot shard the time axis.
    """
    images.check_one_size(config.dataset)
    classification.check(config, dataset)
    height, width, _ = dataset.train["image"].shape[1:]
    rnn.check_mesh(config.mesh, config.model, height * width, f"an image of {height * width} pixels")
    return config


class SequenceClassification(Classification):
    """Image classification with several devices along the pixels."""

    per_device_gradients = True
    parallel_over_time = True  # with a parallel cell; `complete` rejects the others


def make_task(config: SequentialImagesConfig, dataset: Dataset) -> SequenceClassification:
    """Builds the classification task of the data set's images and the config's network."""
    height, width, channels = dataset.train["image"].shape[1:]
    permutation = fixed_permutation(height * width) if config.permuted else None

    def create(model: RecurrentConfig, rngs: nnx.Rngs) -> nnx.Module:
        return SequenceClassifier(model, channels, len(dataset.label_names), permutation, rngs)

    return SequenceClassification.from_config(Network(create, config.model), config, dataset)


EXPERIMENT = app.Experiment(
    "sequential_images",
    str(__doc__),
    {"default": get_config, "permuted": permuted, "cifar10": cifar10},
    make_task,
    prepare=prepare,
    complete=complete,
)

if __name__ == "__main__":
    app.main(EXPERIMENT)
