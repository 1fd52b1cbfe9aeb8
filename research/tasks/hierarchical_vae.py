"""Hierarchical variational autoencoders: bounds, metrics and plots by group of latents."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research import plots, sharding
from research.data.batch import Batch
from research.data.sources import Dataset
from research.tasks import densities, vae_plots
from research.tasks.predictor import Predictor
from research.tasks.task import Metrics
from research.tasks.vae import VAE

_PLOTTED = 50  # reconstructions
_MEASURED = 1000  # test images that the plotted KL is averaged over


@dataclasses.dataclass(frozen=True)
class HierarchicalVAE(VAE):
    """A VAE with groups of latents (`research.models.hierarchical_vae`).

    Attributes, where they are not as in `VAE`:
      network: has the methods `bottom_up` and `infer` in addition to `encode` and `decode`.
      shapes: (height, width, channels) of each group, in the order in which they are drawn.
      free_bits: lower limit, in nats, of the KL of a group averaged over the batch.
      warmup_steps: updates over which beta rises. Until then, the groups' KL is also balanced: group g counts
        gamma_g times, with gamma_g proportional to its number of positions times its mean KL over the batch, and the
        mean of gamma 1 (Vahdat & Kautz 2020, appendix A). Groups that are used little pay little at first.
    """

    per_device_gradients: ClassVar[bool] = True

    shapes: tuple[tuple[int, int, int], ...] = ()

    def _posterior(self, model: Any, targets: jax.Array) -> Any:
        return model.bottom_up(targets)

    def _num_latents(self, model: Any, posterior: Any) -> int:
        del model, posterior
        return sum(map(math.prod, self.shapes))

    def _log_weights(
        self, model: Any, targets: jax.Array, posterior: Any, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As the method of `VAE`; the third result is the KL of each group, [b, groups], a mean over the samples."""
        latents, mean, logvar, parameters = model.infer(posterior, noise)
        kl = densities.kl_to_standard(mean, logvar).mean(1)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        by_group = jnp.stack([part.sum(-1) for part in jnp.split(kl, ends[:-1], axis=-1)], -1)
        return self.log_prob(targets[:, None], parameters), densities.log_ratio(noise, latents, logvar), by_group

    def _details(self, posterior: Any, kl: jax.Array, *, train: bool) -> Metrics:
        return {f"kl_group{number}": kl[:, number] for number in range(len(self.shapes))}

    def _training_kl(self, kl: jax.Array, step: jax.Array | None) -> jax.Array:
        counted = super()._training_kl(kl, step)
        if not self.warmup_steps or step is None:
            return counted
        positions = jnp.array([height * width for height, width, _ in self.shapes], jnp.float32)
        weights = jax.lax.stop_gradient(positions * sharding.batch_mean(kl)) + 1e-6
        return counted * jnp.where(step + 1 < self.warmup_steps, weights / weights.mean(), 1.0)

    def plots(self, predict: Predictor, dataset: Dataset) -> dict[str, Callable[[], Any]]:
        """Plots reconstructions, interpolations, samples of the prior, and the KL of each group on the test set."""
        targets, means = predict(self.encoded, {"image": dataset.test["image"][:_PLOTTED]})
        reconstructed = predict(self.decoded, {"latents": means})
        ends = means[: len(means) // 2 * 2][: 2 * vae_plots.GRID_SIZE]
        between = predict(self.decoded, {"latents": vae_plots.interpolated_latents(ends)}) if len(ends) else None
        samples = self.draw_prior(predict, means.shape[1], vae_plots.GRID_SIZE**2)
        kl = predict(self.group_kl, {"image": dataset.test["image"][:_MEASURED]}).mean(0)
        drawings: dict[str, Callable[[], Any]] = {
            "reconstructions": lambda: vae_plots.reconstructions(targets, reconstructed),
            "samples": lambda: plots.image_grid(samples, vae_plots.GRID_SIZE, "samples of the prior"),
            "groups": lambda: vae_plots.groups(kl, self.shapes),
        }
        if between is not None:
            title = "interpolations between the latents of test images (left and right)"
            drawings["interpolations"] = lambda: plots.image_grid(between, vae_plots.GRID_SIZE, title)
        return drawings

    def group_kl(self, model: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """Returns the KL of each group, [b, groups], as in evaluation."""
        values = self.evaluate(model, batch, key=key, train=False)
        return jnp.stack([values[f"kl_group{number}"] for number in range(len(self.shapes))], -1)
