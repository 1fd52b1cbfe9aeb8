"""An experiment with sharding rules: residual perceptrons whose hidden layers are split as in Shoeybi et al. (2019)."""

import math

import jax
from flax import nnx

from research import app
from research.config import Config, DatasetConfig, OptimizerConfig
from research.data import images
from research.tasks.classification import Classification

RULES = {
    "up/kernel": (None, "model"),  # by columns
    "up/bias": ("model",),
    "down/kernel": ("model", "fsdp"),  # by rows; its other axis is only stored in shards
    "^(stem|head)/kernel": (None, None),
    "bias": (None,),
}


class Block(nnx.Module):
    """A residual perceptron with one hidden layer."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.relu(self.up(x)))


class Network(nnx.Module):
    """Two blocks between dense layers."""

    def __init__(self, inputs, classes, rngs):
        self.stem, self.head = nnx.Linear(inputs, 16, rngs=rngs), nnx.Linear(16, classes, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x, *, train, key=None):
        x = self.stem(x.reshape(x.shape[0], -1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def get_config():
    """One epoch of Adam on the digits, with averaged parameters."""
    optimizer = OptimizerConfig(name="adam", learning_rate=0.01, ema_decay=0.9)
    return Config(num_epochs=1, batch_size=96, dataset=DatasetConfig(name="digits"), optimizer=optimizer)


def make_task(_, dataset):
    """Returns the task of classifying the data set's images."""
    pixels, classes = math.prod(dataset.train["image"].shape[1:]), len(dataset.label_names)
    return Classification(
        lambda rngs: Network(pixels, classes, rngs), *dataset.statistic(images.channel_statistics, "image")
    )


EXPERIMENT = app.Experiment("megatron", str(__doc__), {"default": get_config}, make_task, sharding_rules=RULES)

if __name__ == "__main__":
    app.main(EXPERIMENT)
