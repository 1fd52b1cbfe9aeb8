"""Classification of photographs of any size, from scratch, with a ResNet or a ConvNeXt.

python -m experiments.image_classifier --config.dataset.name=folder --config.dataset.data_dir=DIR

trains on a folder of pictures: DIR/train/<class>/... and DIR/test/<class>/..., or DIR/<class>/..., of which a tenth is
then held out for testing. Other sets: `--config.dataset.name=imagenet2012` and any other prepared TFDS set of images,
or `hf:NAME` for a Hugging Face set. Training images are random crops, resized to `--config.dataset.image_size` and
flipped; evaluation takes the center of each image.

On Caltech-101 (100 classes, 30 photographs of each) the default reaches 49.7% in 24 minutes on 2 cores (README.md).
A GPU has time for larger images: `--config.dataset.train_image_size=128 --config.dataset.image_size=160`.

`--config=imagenet`, `imagenet_a3`, `imagenet_lars` and `convnext` are published recipes for ImageNet, which have not
been run here. `python -m launch.plan experiments.image_classifier --config=imagenet --topology=h100-8` estimates what
they take, without the data.
"""

import dataclasses

from flax import nnx

from research import app
from research.config import AugmentConfig, DatasetConfig, ImageNetworkConfig, OptimizerConfig
from research.data.sources import Dataset
from research.errors import UserError
from research.models import image_networks
from research.parametrization import Network
from research.tasks import classification
from research.tasks.classification import Classification, ClassificationConfig


@dataclasses.dataclass
class ImageClassifierConfig(ClassificationConfig):
    """Image classification."""

    model: ImageNetworkConfig = dataclasses.field(default_factory=ImageNetworkConfig)


def get_config() -> ImageClassifierConfig:
    """ResNet-18, trained at 64 pixels and evaluated at 96: a recipe for a few thousand photographs on a CPU."""
    return ImageClassifierConfig(
        num_epochs=36,
        batch_size=32,
        dataset=DatasetConfig(name="folder", image_size=96, train_image_size=64, crop_min_area=0.25, center_crop=0.8),
        optimizer=OptimizerConfig(
            name="nesterov", learning_rate=0.05, weight_decay=5e-3, schedule="linear", warmup=0.1, ema_decay=0.99
        ),
        label_smoothing=0.1,
        mirror=True,
        augment=AugmentConfig(flip="random", brightness=0.3, contrast=0.3, saturation=0.3),
    )


def imagenet() -> ImageClassifierConfig:
    """ResNet-50 on ImageNet by Goyal et al. 2017 (arXiv 1706.02677, section 5.1); not run here.

    The source reports 76.4% top-1 with batches of 256, and 76.3% with 8,192: `--config.batch_size=8192` scales the
    learning rate to 3.2, as there. What differs:

    - The warm-up of 5 epochs starts from 0. In the source it starts from the rate of batches of 256 examples, so that
      these have none.
    - The source's batch norm has the statistics of a GPU's 32 examples: `norm_group`.
    - bfloat16 instead of float32.
    """
    return ImageClassifierConfig(
        num_epochs=90,
        batch_size=256,
        dataset=DatasetConfig(name="imagenet2012", test_split="validation", image_size=224, center_crop=0.875),
        optimizer=OptimizerConfig(
            name="nesterov",
            learning_rate=0.1,
            batch_scaling="linear",
            momentum=0.9,
            weight_decay=1e-4,
            schedule="step",
            milestones="1/3,2/3,8/9",  # epochs 30, 60 and 80
            warmup=5 / 90,
        ),
        model=ImageNetworkConfig(name="resnet50", norm_group=32, dtype="bfloat16"),
        augment=AugmentConfig(flip="random"),
    )


def imagenet_a3() -> ImageClassifierConfig:
    """ResNet-50 on ImageNet by procedure A3 of Wightman et al. 2021 (arXiv 2110.00476, table 2); not run here.

    The source reports 78.1% top-1 at 224 pixels. What cannot be expressed, or differs:

    - RandAugment's magnitude has no standard deviation (0.5 in the source), and its operations are those of Cubuk et
      al. 2020, each always applied; timm's have other ranges, and are skipped with probability 1/2.
    - Each image draws whether it is mixed by MixUp or CutMix, and the weight; in the source a batch draws once.
    - LAMB has no bounds; timm's clips the gradient to norm 1, as here.
    - Batch norm has the statistics of 128 examples: `norm_group`; of a GPU's in the source.
    """
    return ImageClassifierConfig(
        num_epochs=100,
        batch_size=2048,
        dataset=DatasetConfig(
            name="imagenet2012", test_split="validation", image_size=224, train_image_size=160, center_crop=0.95
        ),
        optimizer=OptimizerConfig(
            name="lamb", learning_rate=8e-3, weight_decay=0.02, schedule="cosine", warmup=5 / 100, clip_norm=1.0
        ),
        model=ImageNetworkConfig(name="resnet50", norm_group=128, dtype="bfloat16"),
        loss="sigmoid",
        target_threshold=0.2,
        augment=AugmentConfig(flip="random", randaugment=2, randaugment_magnitude=6.0, mixup=0.1, cutmix=1.0),
    )


def imagenet_lars() -> ImageClassifierConfig:
    """ResNet-50 on ImageNet by LARS with batches of 32,768 (You et al. 2017, arXiv 1708.03888); not run here.

    The peak learning rate and the warm-up are those of Google's TPU code for this batch size
    (github.com/tensorflow/tpu, models/official/resnet/lars_util.py), and so are momentum, weight decay and the 90
    epochs; the label smoothing is MLPerf's. What cannot be expressed, or differs:

    - There the learning rate decays quadratically, here linearly.
    - There biases and norms have the learning rate itself, here a thousandth of it, LARS's trust coefficient.
    - Batch norm has the statistics of 64 examples: `norm_group`.
    """
    config = imagenet()
    config.batch_size = 32_768
    config.label_smoothing = 0.1
    config.model.norm_group = 64
    config.optimizer = OptimizerConfig(
        name="lars", learning_rate=34.0, momentum=0.9, weight_decay=1e-4, schedule="linear", warmup=12 / 90
    )
    return config


def convnext() -> ImageClassifierConfig:
    """ConvNeXt-T on ImageNet by Liu et al. 2022 (arXiv 2201.03545, table 5); not run here.

    The source reports 82.1% top-1. What cannot be expressed, or differs:

    - RandAugment's magnitude has no standard deviation (0.5 in the source), and its operations are those of Cubuk et
      al. 2020, each always applied; timm's have other ranges, and are skipped with probability 1/2.
    - Each image draws whether it is mixed by MixUp or CutMix, and the weight; in the source a batch draws once.
    - Random erasing fills with the mean; the source fills with noise.
    - The average of the parameters leaves the initial ones sooner (`research.optimizers.update_ema`), and evaluation
      uses it.
    """
    return ImageClassifierConfig(
        num_epochs=300,
        batch_size=4096,
        dataset=DatasetConfig(name="imagenet2012", test_split="validation", image_size=224, center_crop=0.875),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=4e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup=20 / 300,
            ema_decay=0.9999,
        ),
        model=ImageNetworkConfig(name="convnext_tiny", drop_path=0.1, dtype="bfloat16"),
        label_smoothing=0.1,
        augment=AugmentConfig(
            flip="random", randaugment=2, randaugment_magnitude=9.0, erasing=0.25, mixup=0.8, cutmix=1.0
        ),
    )


def complete(config: ImageClassifierConfig, dataset: Dataset) -> ImageClassifierConfig:
    """Returns the config after checking it against the data set.

    Raises:
      UserError: the data set has no images, or they are too small for the network or the augmentation.
    """
    if "image" not in dataset.train:
        raise UserError(f"--config.dataset.name={dataset.name} has no images to classify: choose a set of images")
    shapes = [split["image"].shape[1:] for split in (dataset.train, dataset.test)]
    classification.check(config, dataset)
    return dataclasses.replace(config, model=image_networks.resolve(config.model, min(shapes)))


def make_task(config: ImageClassifierConfig, dataset: Dataset) -> Classification:
    """Builds the classification task of the data set's images and the config's network."""

    def create(model: ImageNetworkConfig, rngs: nnx.Rngs) -> nnx.Module:
        shape = dataset.train["image"].shape[1:]
        return image_networks.create(model, image_shape=shape, num_classes=len(dataset.label_names), rngs=rngs)

    network = Network(create, config.model, image_networks.torch_names)
    return Classification.from_config(network, config, dataset)


EXPERIMENT = app.Experiment(
    "image_classifier",
    str(__doc__),
    {
        "default": get_config,
        "imagenet": imagenet,
        "imagenet_a3": imagenet_a3,
        "imagenet_lars": imagenet_lars,
        "convnext": convnext,
    },
    make_task,
    complete=complete,
)

if __name__ == "__main__":
    app.main(EXPERIMENT)
