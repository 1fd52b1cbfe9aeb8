"""A minimal experiment with a command line: a linear classifier, quick to compile."""

import dataclasses

import jax
from flax import nnx

from research import app
from research.config import Config, DatasetConfig, OptimizerConfig, option
from research.data import images
from research.layers.dropout import Dropout
from research.tasks.classification import Classification


@dataclasses.dataclass
class ModelConfig:
    """Fields of the network."""

    width: int = option(10, "hidden units", minimum=1)
    dropout: float = option(0.0, "dropout rate", minimum=0, below=1, step_input=True)


@dataclasses.dataclass
class LinearConfig(Config):
    """Fields of the experiment."""

    label_smoothing: float = option(0.0, "part of the target spread over all classes", minimum=0, step_input=True)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)


class Network(nnx.Module):
    """Two dense layers with dropout between them and no nonlinearity."""

    per_device_gradients = True

    def __init__(self, config, shape, classes, rngs):
        self.first = nnx.Linear(shape[0] * shape[1] * shape[2], config.width, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        self.second = nnx.Linear(config.width, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        x = self.first(images.reshape(images.shape[0], -1))
        return self.second(self.dropout(x, train=train, key=key))


def get_config() -> LinearConfig:
    """One epoch of SGD on the digits."""
    return LinearConfig(num_epochs=1, dataset=DatasetConfig(name="digits"), optimizer=OptimizerConfig(name="sgd"))


def make_task(config, dataset):
    """Returns the task of classifying the data set's images."""
    shape = dataset.train["image"].shape[1:]

    def network(rngs):
        return Network(config.model, shape, len(dataset.label_names), rngs)

    statistics = dataset.statistic(images.channel_statistics, "image")
    return Classification(network, *statistics, label_smoothing=config.label_smoothing)


EXPERIMENT = app.Experiment("linear", str(__doc__), {"default": get_config}, make_task)

if __name__ == "__main__":
    app.main(EXPERIMENT)
