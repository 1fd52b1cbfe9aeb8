"""Plots of variational autoencoders, and the latents that are decoded for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from research import plots
from research.record import drawing

GRID_SIZE = 10  # images in a row of a plot, and latents traversed
_TRAVERSAL = np.linspace(-3, 3, 11, dtype=np.float32)  # covers nearly all of the prior's mass
_BETWEEN = np.linspace(0, 1, GRID_SIZE, dtype=np.float32)


def reconstructions(images: np.ndarray, reconstructed: np.ndarray) -> Any:
    """Plots images, float [n, h, w, c] in 0..1, each followed by its reconstruction."""
    pairs = np.stack([images, reconstructed], 1).reshape(-1, *images.shape[1:])
    return plots.image_grid(pairs, GRID_SIZE, "test images, each followed by its reconstruction")


def traversed_latents(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the latents that vary most, and copies of the first example in which each runs from -3 to 3.

    Args:
      means: float32 [n, latents].

    Returns:
      The numbers of m latents, and float32 [m * 11, latents].
    """
    traversed = np.argsort(-means.var(0), kind="stable")[:GRID_SIZE]
    latents = np.tile(means[0], (len(traversed), len(_TRAVERSAL), 1))
    for row, latent in enumerate(traversed):
        latents[row, :, latent] = _TRAVERSAL
    return traversed, latents.reshape(-1, means.shape[1])


def traversals(images: np.ndarray, traversed: np.ndarray) -> Any:
    """Plots the images of `traversed_latents`."""
    title = f"rows: latents {', '.join(map(str, traversed))} from {_TRAVERSAL[0]:g} to {_TRAVERSAL[-1]:g}"
    return plots.image_grid(images, len(_TRAVERSAL), title)


def interpolated_latents(means: np.ndarray) -> np.ndarray:
    """Returns latents on the lines between the examples of each pair: float32 [2 n, latents] to [n * 10, latents]."""
    first, last = means[::2, None], means[1::2, None]
    return (first + (last - first) * _BETWEEN[:, None]).reshape(-1, means.shape[1])


def groups(kl: np.ndarray, shapes: Sequence[tuple[int, int, int]]) -> Any:
    """Plots the mean KL of each group of latents, float [groups] in nats, colored by resolution (shapes [h, w, c])."""
    names = [f"{height}x{width}" for height, width, _ in shapes]
    figure = drawing.figure(max(5.0, 0.3 * len(kl) + 2), 4)
    axes: Any = figure.subplots()
    for color, name in enumerate(dict.fromkeys(names)):
        numbers = [number for number, other in enumerate(names) if other == name]
        axes.bar(numbers, kl[numbers], color=f"C{color}", label=name)
    axes.set_title("KL of each group, from the top, on test images", fontsize="medium")
    axes.set(xlabel="group", ylabel="nats an image")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize="small")
    return figure
