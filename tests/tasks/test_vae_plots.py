"""The plots of a VAE show the images, latents and traversals of a network that is known."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from research.data.batch import Batch
from research.tasks.vae import VAE


def test_plots_show_reconstructions_and_traversals():
    """Latent 0 lights the first column, latent 1 the rest; an image's latents say which are lit."""
    shape, columns = (2, 3, 1), np.array([1, 0, 0] * 2)

    def encode(x):
        first = x.reshape(len(x), -1) @ jnp.asarray(columns) / 2
        return jnp.stack([10 * first - 5, 0.1 * first], -1), jnp.zeros((len(x), 2))

    def decode(z):
        return jnp.where(jnp.asarray(columns), z[..., :1], z[..., 1:] * 1000)

    images = np.zeros((4, *shape), np.uint8)
    images[1::2, :, 0] = 255
    task = VAE(lambda _: None, shape, "bernoulli", "stochastic")  # pyright: ignore
    test = {"image": images, "label": np.array([0, 1, 0, 1])}
    dataset = SimpleNamespace(test=test, label_names=("dark", "lit"))
    model = SimpleNamespace(encode=encode, decode=decode)

    def predict(function, arrays, **_):
        count = len(next(iter(arrays.values())))
        index = np.arange(count, dtype=np.int32) if "image" in arrays else None
        return jax.tree.map(np.asarray, function(model, Batch(dict(arrays), index), jax.random.key(0)))

    plots = task.plots(predict, dataset)  # pyright: ignore
    assert set(plots) == {"reconstructions", "samples", "traversals", "latents"}
    shown = {name: draw().axes[0] for name, draw in plots.items()}
    pairs = shown["reconstructions"].images[0].get_array()
    np.testing.assert_array_equal(pairs[:2, :3], images[0, ..., 0])  # an image, then its reconstruction
    np.testing.assert_allclose(pairs[:2, 4], 1 / (1 + np.exp(5)), rtol=1e-4)
    np.testing.assert_allclose(pairs[:2, 12], 1 / (1 + np.exp(-5)), rtol=1e-4)
    rows = shown["traversals"].images[0].get_array()  # the latent that varies most comes first
    np.testing.assert_allclose(rows[0, ::4], 1 / (1 + np.exp(-np.linspace(-3, 3, 11))), rtol=1e-4)
    assert "latents 0, 1 from -3 to 3" in shown["traversals"].get_title()
    assert shown["samples"].images[0].get_array().shape == (29, 39)
    dark, lit = shown["latents"].collections
    np.testing.assert_allclose(dark.get_offsets(), [[-5, 0]] * 2)
    np.testing.assert_allclose(lit.get_offsets(), [[5, 0.1]] * 2, rtol=1e-6)
