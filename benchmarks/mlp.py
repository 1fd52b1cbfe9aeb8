"""A small multilayer perceptron on images, trained by `benchmarks.sweep` and `benchmarks.population`."""

import dataclasses
import itertools
import math

import jax
from flax import nnx

from research import app
from research.config import Config, DatasetConfig, OptimizerConfig, option
from research.data import images
from research.data.sources import Dataset
from research.models.blocks import Linear
from research.tasks.classification import Classification


@dataclasses.dataclass
class ModelConfig:
    """The network."""

    width: int = option(64, "units of each of the two hidden layers", minimum=1)


@dataclasses.dataclass
class MLPConfig(Config):
    """Image classification."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)


class MLP(nnx.Module):
    """Two hidden ReLU layers."""

    per_device_gradients = True

    def __init__(self, inputs: int, width: int, classes: int, rngs: nnx.Rngs):
        sizes = inputs, width, width, classes
        self.layers = nnx.List([Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        """Computes logits [b, classes] of images, float32 [b, h, w, c]."""
        del train, key
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def get_config() -> MLPConfig:
    """Adam on the digits."""
    return MLPConfig(batch_size=32, dataset=DatasetConfig(name="digits"), optimizer=OptimizerConfig(name="adam"))


def make_task(config: MLPConfig, dataset: Dataset) -> Classification:
    """Builds the classification task of the data set's images."""
    pixels = math.prod(dataset.train["image"].shape[1:])
    return Classification(
        lambda rngs: MLP(pixels, config.model.width, len(dataset.label_names), rngs),
        *dataset.statistic(images.channel_statistics, "image"),
    )


EXPERIMENT = app.Experiment("mlp", str(__doc__), {"default": get_config}, make_task)

if __name__ == "__main__":
    app.main(EXPERIMENT)
