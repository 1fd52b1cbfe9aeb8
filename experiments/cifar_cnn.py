"""Convolutional networks on CIFAR-10.

python -m experiments.cifar_cnn                     the tutorial CNN, trained by a recent recipe (Muon)
python -m experiments.cifar_cnn --config=tutorial   the tutorial's own settings: Adam, no augmentation
python -m experiments.cifar_cnn --config=quick      the tutorial's accuracy in one epoch
python -m experiments.cifar_cnn --config=airbench   the airbench network at half width

The tutorial CNN is the small network of TensorFlow's CIFAR-10 tutorial: https://www.tensorflow.org/tutorials/images/cnn
"""

import dataclasses

import numpy as np
from flax import nnx

from research import app
from research.config import AugmentConfig, CNNConfig, DatasetConfig, OptimizerConfig, option
from research.data import images
from research.data.sources import Dataset
from research.errors import UserError
from research.models import cnn
from research.models.airbench import whitening_kernel
from research.parametrization import Network
from research.tasks import classification
from research.tasks.classification import Classification, ClassificationConfig


@dataclasses.dataclass
class CifarConfig(ClassificationConfig):
    """Image classification."""

    translate: bool = option(
        False, "evaluate with the mean logits of each image and the image shifted by a pixel", may_change="evaluation"
    )
    model: CNNConfig = dataclasses.field(default_factory=CNNConfig)


def get_config() -> CifarConfig:
    """The tutorial CNN with Muon, warm-up and linear decay, EMA of the parameters and light augmentation."""
    return CifarConfig(
        num_epochs=10,
        batch_size=64,
        dataset=DatasetConfig(name="cifar10|digits"),
        optimizer=OptimizerConfig(name="muon", schedule="linear", warmup=0.1, ema_decay=0.998),
        label_smoothing=0.1,
        augment=AugmentConfig(crop=2, flip="alternating"),
    )


def tutorial() -> CifarConfig:
    """The settings of TensorFlow's tutorial: Adam at 0.001, batch 32, 10 epochs, no augmentation."""
    return CifarConfig(num_epochs=10, batch_size=32, optimizer=OptimizerConfig(name="adam"))


def quick() -> CifarConfig:
    """The tutorial's accuracy in the shortest time: one epoch, with a learning rate that decays to 0."""
    return CifarConfig(
        num_epochs=1,
        batch_size=32,
        dataset=DatasetConfig(name="cifar10|digits"),
        optimizer=OptimizerConfig(name="muon", schedule="linear", warmup=0.05),
    )


def airbench() -> CifarConfig:
    """The airbench network at half width, with mirrored views in evaluation and microbatches that fit a CPU's cache."""
    return CifarConfig(
        num_epochs=14,
        batch_size=256,
        microbatch_size=64,
        optimizer=OptimizerConfig(name="muon", learning_rate=0.03, weight_decay=0.2, schedule="linear", ema_decay=0.98),
        label_smoothing=0.2,
        mirror=True,
        model=CNNConfig(name="airbench", width=32),
        augment=AugmentConfig(crop=2, flip="alternating"),
    )


def complete(config: CifarConfig, dataset: Dataset) -> CifarConfig:
    """The config with the published numbers of the architecture where it leaves them open.

    Raises:
      UserError: the data set has no images, or they do not fit the architecture or the augmentation.
    """
    if "image" not in dataset.train:
        raise UserError(f"--config.dataset.name={dataset.name} has no images to classify: use cifar10, mnist or digits")
    shape = dataset.train["image"].shape[1:]
    images.check_one_size(config.dataset)
    classification.check(config, dataset)
    return dataclasses.replace(config, model=cnn.resolve(config.model, shape))


def make_task(config: CifarConfig, dataset: Dataset, *, norm_momentum: float = 0.95) -> Classification:
    """Builds the classification task of the data set's images and the config's network.

    Args:
      config: resolved.
      dataset: has images and labels.
      norm_momentum: momentum of airbench's batch norm (`cnn.create`). The published 0.6 is for batches of 1,024 and
        more; this experiment's are smaller.
    """
    mean, std = dataset.statistic(images.channel_statistics, "image")

    def whitening(train: np.ndarray) -> np.ndarray:
        return whitening_kernel(np.asarray(images.normalize(train[:5000], mean, std)))

    kernel = dataset.statistic(whitening, "image") if config.model.name == "airbench" else None

    def create(model: CNNConfig, rngs: nnx.Rngs) -> nnx.Module:
        return cnn.create(
            model,
            image_shape=dataset.train["image"].shape[1:],
            num_classes=len(dataset.label_names),
            rngs=rngs,
            whitening=None if kernel is None else np.asarray(kernel, np.float32),
            norm_momentum=norm_momentum,
        )

    return Classification.from_config(Network(create, config.model), config, dataset, translate=config.translate)


EXPERIMENT = app.Experiment(
    "cifar_cnn",
    str(__doc__),
    {"default": get_config, "tutorial": tutorial, "quick": quick, "airbench": airbench},
    make_task,
    complete=complete,
)

if __name__ == "__main__":
    app.main(EXPERIMENT)
