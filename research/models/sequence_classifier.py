"""A recurrent network that reads an image one pixel at a time and names its class (Le et al. 2015, arXiv 1504.00941).

The layers are those of `research.models.rnn`. Their outputs are averaged over time before the logits, as in Orvieto et
al. 2023 (arXiv 2303.06349, section 2): the gradient then reaches every pixel directly, however far it is from the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research import sharding
from research.config import RecurrentConfig
from research.models import rnn
from research.models.blocks import Linear


def fixed_permutation(length: int) -> np.ndarray:
    """Returns the order in which the pixels of a permuted image are read, int [length]: the same in every run."""
    # NumPy promises that RandomState's streams never change; a Generator's may.
    return np.random.RandomState(0).permutation(length)


class SequenceClassifier(nnx.Module):
    """Linear layer of each pixel, recurrent layers, mean over time, and logits.

    Args:
      config: the layers.
      channels: of a pixel.
      num_classes: the number of logits.
      permutation: int [h * w], the pixels in the order in which they are read; None: row by row.
      rngs: for initialization.
    """

    per_device_gradients = True

    def __init__(
        self,
        config: RecurrentConfig,
        channels: int,
        num_classes: int,
        permutation: np.ndarray | None,
        rngs: nnx.Rngs,
    ):
        width, dtype = config.width, jnp.dtype(config.dtype)
        # The structure of a module must be hashable: no array, and no config.
        self.permutation = None if permutation is None else tuple(permutation.tolist())
        self.name, self.width = config.name, width
        self.pixel = Linear(channels, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([rnn.LAYERS[config.name](config, rngs) for _ in range(config.layers)])
        # As in `rnn.RNN`: residual layers leave a sum that nobody has normalized yet.
        self.norm = nnx.RMSNorm(width, rngs=rngs) if config.name in rnn.PARALLEL else None
        self.classify = Linear(width, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool, key: jax.Array | None = None) -> jax.Array:
        """Computes the logits of normalized images, float [b, h, w, channels]: float32 [b, num_classes]."""
        keys = [None] * len(self.layers) if key is None else list(jax.random.split(key, len(self.layers)))
        pixels = images.reshape(len(images), -1, images.shape[-1])
        if self.permutation is not None:
            pixels = pixels[:, np.array(self.permutation)]
        x = rnn.shard_over_time(self.pixel(pixels.transpose(1, 0, 2)))
        state = sharding.vary(rnn.initial_state(self.name, self.width, len(images)))  # each device has its own
        for layer, layer_key in zip(self.layers, keys):
            x, _ = layer(layer.inputs(x) if isinstance(layer, rnn.Recurrent) else x, state, train=train, key=layer_key)
        if self.norm is not None:
            x = self.norm(x)
        return self.classify(x.mean(0)).astype(jnp.float32)
