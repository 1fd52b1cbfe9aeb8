"""An experiment whose networks use Flax's own layers and know nothing of meshes, as a user may write them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from research import app
from research.config import Config, DatasetConfig, OptimizerConfig, option
from research.data import images
from research.tasks.classification import Classification


class BatchNorm(nnx.Module):
    """Batch normalization."""

    def __init__(self, inputs, classes, rngs):
        self.first, self.norm = nnx.Linear(inputs, 16, rngs=rngs), nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        x = self.first(x.reshape(len(x), -1))
        return self.last(nnx.relu(self.norm(x, use_running_average=not train)))


class Dropout(nnx.Module):
    """Flax's dropout, with the step's random key."""

    def __init__(self, inputs, classes, rngs):
        self.first, self.dropout = nnx.Linear(inputs, 16, rngs=rngs), nnx.Dropout(0.5)
        self.last = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        x = nnx.relu(self.first(x.reshape(len(x), -1)))
        return self.last(self.dropout(x, deterministic=not train, rngs=key))


class Noise(nnx.Module):
    """Adds noise of the shape of the whole batch."""

    def __init__(self, inputs, classes, rngs):
        self.first, self.last = nnx.Linear(inputs, 16, rngs=rngs), nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        x = self.first(x.reshape(len(x), -1))
        return self.last(x + jax.random.normal(key, x.shape) if train else x)


class Spectral(nnx.Module):
    """Spectral normalization, whose power iteration is state carried from step to step."""

    def __init__(self, inputs, classes, rngs):
        self.first = nnx.SpectralNorm(nnx.Linear(inputs, 16, rngs=rngs), rngs=rngs)
        self.last = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1), update_stats=train)))


class Everything(nnx.Module):
    """All of the above at once, with dropout from the module's own random stream."""

    def __init__(self, inputs, classes, rngs):
        self.first = nnx.SpectralNorm(nnx.Linear(inputs, 16, rngs=rngs), rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(16, momentum=0.9, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        x = self.norm(self.first(x.reshape(len(x), -1), update_stats=train), use_running_average=not train)
        if train:
            x = x + 0.1 * jax.random.normal(key, x.shape)
        return self.last(self.dropout(nnx.relu(x), deterministic=not train))


class Contrastive(Classification):
    """Classification with an additional contrastive loss over all pairs of a batch."""

    def evaluate(self, model, batch, *, key, train):
        """Adds the contrastive term (van den Oord et al. 2018, equation 4) to the loss."""
        values = super().evaluate(model, batch, key=key, train=train)
        embeddings = model(images.normalize(batch["image"], self.mean, self.std), train=False)
        similarities = jax.nn.log_softmax(embeddings @ embeddings.T)
        return values | {"loss": values["loss"] - jnp.diagonal(similarities)}


NETWORKS = {network.__name__: network for network in (BatchNorm, Dropout, Noise, Spectral, Everything)}


@dataclasses.dataclass
class OutsiderConfig(Config):
    """Image classification by one of the networks."""

    network: str = option("BatchNorm", "network", choices=tuple(NETWORKS))
    contrastive: bool = option(False, "add a loss over all pairs of the batch")


def get_config():
    """Two epochs of SGD with momentum on the digits."""
    optimizer = OptimizerConfig(name="momentum", learning_rate=0.02)
    return OutsiderConfig(num_epochs=2, batch_size=96, dataset=DatasetConfig(name="digits"), optimizer=optimizer)


def make_task(config, dataset):
    """Returns the task of classifying the data set's images."""
    pixels, classes = math.prod(dataset.train["image"].shape[1:]), len(dataset.label_names)

    def network(rngs):
        return NETWORKS[config.network](pixels, classes, rngs)

    task = Contrastive if config.contrastive else Classification
    return task(network, *dataset.statistic(images.channel_statistics, "image"))


EXPERIMENT = app.Experiment("outsider", str(__doc__), {"default": get_config}, make_task)

if __name__ == "__main__":
    app.main(EXPERIMENT)
