"""Classification of photographs of any size, from scratch, with a ResNet or a ConvNeXt.

python -m experiments.image_classifier --config.dataset.name=folder --config.dataset.data_dir=DIR

trains on a folder of pictures: DIR/train/<class>/... and DIR/test/<class>/..., or DIR/<class>/..., of which a tenth is
then held out for testing. Other sets: `--config.dataset.name=imagenet2012` and any other prepared TFDS set of images,
or `hf:NAME` for a Hugging Face set. Training images are random crops, resized to `--config.dataset.image_size` and
flipped; evaluation takes the center of each image.

On Caltech-101 (100 classes, 30 photographs of each) the default reaches 36.4% in 30 minutes on 2 slow CPU cores, still
improving (README.md); for better accuracy train longer, on a GPU, with `--config.dataset.train_image_size=128`.
"""

import dataclasses

from flax import nnx

from research import app
from research.config import AugmentConfig, DatasetConfig, ImageNetworkConfig, OptimizerConfig
from research.data import images
from research.data.sources import Dataset
from research.errors import UserError
from research.models import image_networks
from research.parametrization import Network
from research.tasks.classification import Classification, ClassificationConfig


@dataclasses.dataclass
class ImageClassifierConfig(ClassificationConfig):
    """Image classification."""

    model: ImageNetworkConfig = dataclasses.field(default_factory=ImageNetworkConfig)


def get_config() -> ImageClassifierConfig:
    """ResNet-18 at 128 pixels: a recipe for a few thousand photographs on a CPU."""
    return ImageClassifierConfig(
        num_epochs=16,
        batch_size=32,
        dataset=DatasetConfig(name="folder", image_size=128, train_image_size=96, crop_min_area=0.35, center_crop=1.0),
        optimizer=OptimizerConfig(
            name="nesterov", learning_rate=0.05, weight_decay=5e-4, schedule="linear", warmup=0.1, ema_decay=0.99
        ),
        label_smoothing=0.1,
        mirror=True,
        augment=AugmentConfig(flip="random"),
    )


def complete(config: ImageClassifierConfig, dataset: Dataset) -> ImageClassifierConfig:
    """Returns the config after checking it against the data set.

    Raises:
      UserError: the data set has no images, or they are too small for the network or the augmentation.
    """
    if "image" not in dataset.train:
        raise UserError(f"--config.dataset.name={dataset.name} has no images to classify: choose a set of images")
    shapes = [split["image"].shape[1:] for split in (dataset.train, dataset.test)]
    images.check(config.augment, shapes[0])
    return dataclasses.replace(config, model=image_networks.resolve(config.model, min(shapes)))


def make_task(config: ImageClassifierConfig, dataset: Dataset) -> Classification:
    """Builds the classification task of the data set's images and the config's network."""
    mean, std = dataset.statistic(images.channel_statistics, "image")

    def create(model: ImageNetworkConfig, rngs: nnx.Rngs) -> nnx.Module:
        shape = dataset.train["image"].shape[1:]
        return image_networks.create(model, image_shape=shape, num_classes=len(dataset.label_names), rngs=rngs)

    network = Network(create, config.model)
    return Classification(network, mean, std, config.augment, config.label_smoothing, config.mirror)


EXPERIMENT = app.Experiment("image_classifier", str(__doc__), {"default": get_config}, make_task, complete=complete)

if __name__ == "__main__":
    app.main(EXPERIMENT)
