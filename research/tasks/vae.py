"""Variational autoencoders of images: ELBO and IWAE bounds, and the log-likelihood by importance sampling."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research import plots, randomness, sharding
from research.config import is_on
from research.data.batch import Batch
from research.data.sources import Dataset
from research.randomness import Stream
from research.tasks import densities, image_likelihood, vae_plots
from research.tasks.predictor import Predictor
from research.tasks.task import ExportedFunction, Inputs, Metrics, Task
from research.tasks.vae_plots import GRID_SIZE

_ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, section 5.2
_EVAL_BATCH = 1000  # examples of a batch of the log-likelihood's estimate
_MAX_PLOTTED_PIXELS = 2**26  # in the test images that are plotted: 256 MB as float32
_TARGETS, _LATENTS, _RESAMPLING = 0, 1, 2  # purposes of the keys


@dataclasses.dataclass(frozen=True)
class VAE(Task):
    """A variational autoencoder of images (Kingma & Welling 2014, arXiv 1312.6114). All metrics are in nats.

    A bernoulli likelihood models bits: a pixel is 1 with probability gray / 255, drawn at every visit ("stochastic", as
    in Burda et al. 2016) or once ("fixed"). A gaussian likelihood models the density of gray + u, u uniform in 0..1, on
    the scale 0..256. Its log-likelihood is then a lower bound of that of the 8-bit values (Theis et al. 2016, arXiv
    1511.01844, section 3.1), so bits per dimension are comparable with the literature. A logistic likelihood models
    these values themselves (`research.layers.logistic_mixture`), so its bits per dimension are no lower bound.

    Attributes:
      network: builds the network from its rngs: `research.models.vae.VAE`, or any with its two methods.
      image_shape: (h, w, c).
      likelihood: "bernoulli", "gaussian" or "logistic".
      binarize: "stochastic" or "fixed"; "" unless the likelihood is bernoulli.
      samples: k of the training bound. 1: the ELBO, with the KL in closed form; more: IWAE (Burda et al., equation 8).
      gradient_samples: if there are several samples, the number that the gradient is estimated by, without bias; 0: all
        of them, the exact gradient.
      beta: weight of the KL in training (Higgins et al. 2017); with several samples, of log p(z) - log q(z|x).
      warmup_steps: updates over which that weight rises linearly from 0.
      free_bits: lower limit, in nats, of a latent's KL averaged over the batch (Kingma et al. 2016, equation 15).
      final_samples: importance samples of the log-likelihood's estimate at the end of training; 0: no estimate.
    """

    per_device_gradients: ClassVar[bool] = True

    network: Callable[[nnx.Rngs], nnx.Module]
    image_shape: tuple[int, ...]
    likelihood: str
    binarize: str
    samples: int = 1
    gradient_samples: int = 0
    beta: float = 1.0
    warmup_steps: int = 0
    free_bits: float = 0.0
    final_samples: int = 0

    def with_hparams(self, hparams: Mapping[str, Any]) -> "VAE":
        """Returns this task with the `beta` and the `free_bits` of a step."""
        return dataclasses.replace(self, **{name: hparams[name] for name in ("beta", "free_bits") if name in hparams})

    def evaluate(self, model: Any, batch: Batch, *, key: jax.Array, train: bool) -> Metrics:
        """Computes each example's negative bound and its parts.

        Evaluation computes the ELBO, whichever bound training optimizes. Its draws depend on the example's number only,
        so they do not change with the batch size or the devices.

        Args:
          model: the network.
          batch: "image" uint8 [b, h, w, c].
          key: for binarization and latents in training.
          train: whether this is training.

        Returns:
          "loss", "reconstruction" (-log p(x|z)), "kl" and "elbo", [b] each; in evaluation also "mean" and
          "squared_mean" of the latents' means, [b, latents], for `summarize`.
        """
        key = key if train else randomness.key(Stream.EVALUATION)
        # A stream separate from evaluation's: otherwise training and test images of equal number share thresholds.
        fixed = train and self.binarize == "fixed"
        targets = self.targets(batch["image"], batch.index, randomness.key(Stream.FIXED_BITS) if fixed else key)
        posterior = self._posterior(model, targets)
        shape = (self.samples if train else 1, self._num_latents(model, posterior))
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(key, batch.index, _LATENTS))
        log_prob, log_ratio, kl = self._log_weights(model, targets, posterior, noise)
        reconstruction = -log_prob.mean(1)
        loss = reconstruction + kl.sum(-1)
        values = {"loss": loss, "reconstruction": reconstruction, "kl": kl.sum(-1), "elbo": -loss}
        values |= self._details(posterior, kl, train=train)
        if not train:
            return values
        beta = self.beta * jnp.minimum(1.0, (batch.step + 1) / max(self.warmup_steps, 1))
        if self.samples > 1:
            log_weights = log_prob + beta * log_ratio
            bound = jax.nn.logsumexp(log_weights, axis=1) - math.log(self.samples)
            if self.gradient_samples:
                # The bound's gradient is the mean of grad log w under the normalized weights (Burda et al., equation
                # 14). Samples drawn by these weights estimate it without bias, and only they need a backward pass.
                keys = _keys(key, batch.index, _RESAMPLING)
                weights = jax.lax.stop_gradient(log_weights)
                resample = jax.vmap(lambda key, w: jax.random.categorical(key, w, shape=(self.gradient_samples,)))
                resampled = jnp.take_along_axis(noise, resample(keys, weights)[..., None], 1)
                log_prob, log_ratio, _ = self._log_weights(model, targets, posterior, resampled)
                mean_log_weight = (log_prob + beta * log_ratio).mean(1)
                # The value of the bound, with the gradient of the resampled mean.
                bound = jax.lax.stop_gradient(bound - mean_log_weight) + mean_log_weight
            return values | {"loss": -bound}
        return values | {"loss": reconstruction + beta * self._training_kl(kl, batch.step).sum(-1)}

    def _posterior(self, model: Any, targets: jax.Array) -> Any:
        """Computes what the latents are drawn from: mean and log variance of q(z|x), [b, latents]."""
        return model.encode(targets)

    def _num_latents(self, model: Any, posterior: Any) -> int:
        del model
        return posterior[0].shape[-1]

    def _log_weights(
        self, model: Any, targets: jax.Array, posterior: Any, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes log p(x|z) and log p(z) - log q(z|x), [b, k] each, at z = mean + std * noise [b, k, latents].

        The third result is the KL of each latent, [b, latents].
        """
        mean, logvar = posterior
        latents = mean[:, None] + jnp.exp(logvar / 2)[:, None] * noise
        log_prob = self.log_prob(targets[:, None], model.decode(latents))
        log_ratio = densities.log_ratio(noise, latents, logvar[:, None])
        return log_prob, log_ratio, densities.kl_to_standard(mean, logvar)

    def _details(self, posterior: Any, kl: jax.Array, *, train: bool) -> Metrics:
        """Returns further metrics of `evaluate`."""
        del kl
        return {} if train else {"mean": posterior[0], "squared_mean": jnp.square(posterior[0])}

    def _training_kl(self, kl: jax.Array, step: jax.Array | None) -> jax.Array:
        """Returns the KL [b, n] as the training loss counts it at an update, before its weight beta."""
        del step
        # Where a latent's mean KL over the batch is below the limit, every example costs the limit. So the mean over
        # the batch is max(limit, mean), with the matching gradient.
        return jnp.where(sharding.batch_mean(kl) < self.free_bits, self.free_bits, kl) if is_on(self.free_bits) else kl

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """Adds "bits_per_dim" of the ELBO and, in evaluation, "active_units".

        A latent is active if the variance of E[z|x] over the examples is above 0.01 (Burda et al., section 5.2).
        """
        metrics = {name: float(value) for name, value in means.items() if not np.ndim(value)}
        metrics["bits_per_dim"] = -self._bits_per_dim(metrics["elbo"])
        if "mean" in means:
            metrics["active_units"] = float(np.sum(means["squared_mean"] - np.square(means["mean"]) > _ACTIVE_VARIANCE))
        return metrics

    def _bits_per_dim(self, nats: float) -> float:
        return nats / (math.prod(self.image_shape) * math.log(2))

    def targets(self, image: jax.Array, index: jax.Array, key: jax.Array) -> jax.Array:
        """Draws the network's inputs and targets: float32 [b, h, w, c], bits or dequantized values in 0..1.

        Args:
          image: uint8 [b, h, w, c].
          index: int32 [b], the examples' numbers.
          key: the random key; each example's is folded from it and the example's number.
        """
        return image_likelihood.targets(self.likelihood, image, _keys(key, index, _TARGETS))

    def log_prob(self, targets: jax.Array, parameters: jax.Array) -> jax.Array:
        """Computes log p(x|z): targets [..., h, w, c] and the `parameters` of `decode` to [...]."""
        return image_likelihood.log_prob(self.likelihood, targets, parameters)

    def log_likelihood(self, model: Any, batch: Batch, _: jax.Array) -> jax.Array:
        """Estimates log p(x), [b], by `final_samples` samples of q(z|x) (Burda et al., equation 8)."""
        # A loop with a running logsumexp of the weights, so memory does not grow with the number of samples.
        key = randomness.key(Stream.EVALUATION)
        targets = self.targets(batch["image"], batch.index, key)
        posterior = self._posterior(model, targets)
        shape = 1, self._num_latents(model, posterior)
        keys = _keys(key, batch.index, _LATENTS)

        def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            largest, total = carry
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)
            log_weight = jnp.add(*self._log_weights(model, targets, posterior, noise)[:2])[:, 0]
            maximum = jnp.maximum(largest, log_weight)
            return maximum, total * jnp.exp(largest - maximum) + jnp.exp(log_weight - maximum)

        start = jnp.full(len(targets), -jnp.inf), jnp.zeros(len(targets))
        largest, total = jax.lax.fori_loop(0, self.final_samples, add, start)
        return largest + jnp.log(total) - math.log(self.final_samples)

    def final_metrics(self, predict: Predictor, dataset: Dataset) -> dict[str, float]:
        """Computes "test_nll", the mean of -log p(x) over the test set in nats, and the same in bits per dimension."""
        if not self.final_samples:
            return {}
        options = {"batch_size": _EVAL_BATCH, "progress": "test log-likelihood"}
        nll = -float(predict(self.log_likelihood, {"image": dataset.test["image"]}, **options).mean(dtype=np.float64))
        return {"test_nll": nll, "test_nll_bits_per_dim": self._bits_per_dim(nll)}

    def encoded(self, model: Any, batch: Batch, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the targets of evaluation, and the mean of q(z|x), [b, latents]."""
        targets = self.targets(batch["image"], batch.index, randomness.key(Stream.EVALUATION))
        return targets, model.encode(targets)[0]

    def decoded(self, model: Any, batch: Batch, _: jax.Array) -> jax.Array:
        """Computes the expected images given "latents" [b, latents]: float32 [b, h, w, c] in 0..1."""
        return self._expected(model.decode(batch["latents"]))

    def _expected(self, parameters: jax.Array) -> jax.Array:
        return image_likelihood.expected(self.likelihood, parameters, self.image_shape)

    def functions(self, model: Any, dataset: Dataset) -> dict[str, ExportedFunction]:
        """Exports `encode`, `decode` and `sample`.

        - encode: "image" uint8 [b, h, w, c] and "index" int32 [b] to "targets" float32 [b, h, w, c], the network's
          input (drawn as in evaluation), and "mean" and "logvar" of q(z|x), float32 [b, latents].
        - decode: "latents" float32 [b, latents] to the expected "image" float32 [b, h, w, c] in 0..1, and "parameters"
          of p(x|z).
        - sample: "seed" uint32 scalar and "index" int32 [b] to the expected "image" of latents drawn from the prior.
        """
        probe = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        latents = jax.eval_shape(model.encode, probe)[0].shape[1]

        def encode(model: Any, inputs: Inputs) -> dict[str, jax.Array]:
            targets = self.targets(inputs["image"], inputs["index"], randomness.key(Stream.EVALUATION))
            mean, logvar = model.encode(targets)
            return {"targets": targets, "mean": mean, "logvar": logvar}

        def decode(model: Any, inputs: Inputs) -> dict[str, jax.Array]:
            parameters = model.decode(inputs["latents"])
            return {"image": self._expected(parameters), "parameters": parameters}

        def sample(model: Any, inputs: Inputs) -> dict[str, jax.Array]:
            keys = _keys(jax.random.key(inputs["seed"], impl=randomness.IMPLEMENTATION), inputs["index"], _LATENTS)
            drawn = jax.vmap(lambda key: jax.random.normal(key, (latents,)))(keys)
            return {"image": self._expected(model.decode(drawn))}

        image, index = ", ".join(map(str, ("b", *self.image_shape))), ("b", "int32")
        return {
            "encode": ExportedFunction(
                encode,
                {"image": (image, "uint8"), "index": index},
                image_likelihood.TARGETS[self.likelihood],
            ),
            "decode": ExportedFunction(decode, {"latents": (f"b, {latents}", "float32")}, "none"),
            "sample": ExportedFunction(
                sample, {"seed": ("", "uint32"), "index": index}, "`seed` and `index` determine the latents of an image"
            ),
        }

    def draw_prior(
        self, predict: Predictor, latents: int, count: int, seed: int = 0, temperature: float = 1.0
    ) -> np.ndarray:
        """Computes the expected images of `count` draws from the prior: float32 [count, h, w, c] in 0..1.

        `temperature` multiplies the latents' standard deviation.
        """
        draws = randomness.generator(Stream.PRIOR_SAMPLES, seed).standard_normal((count, latents)).astype(np.float32)
        return predict(self.decoded, {"latents": np.float32(temperature) * draws})

    def plots(self, predict: Predictor, dataset: Dataset) -> dict[str, Callable[[], Any]]:
        """Plots reconstructions, samples of the prior and latent traversals; if there are two latents, their means."""
        # Limits the memory: `encoded` returns the float32 targets of all these images along with the means.
        images = dataset.test["image"][: 5 * GRID_SIZE + _MAX_PLOTTED_PIXELS // math.prod(self.image_shape)]
        targets, means = predict(self.encoded, {"image": images})
        targets = targets[: 5 * GRID_SIZE]
        reconstructed = predict(self.decoded, {"latents": means[: 5 * GRID_SIZE]})
        samples = self.draw_prior(predict, means.shape[1], GRID_SIZE**2)
        traversed, latents = vae_plots.traversed_latents(means)
        traversals = predict(self.decoded, {"latents": latents})
        drawings: dict[str, Callable[[], Any]] = {
            "reconstructions": lambda: vae_plots.reconstructions(targets, reconstructed),
            "samples": lambda: plots.image_grid(samples, GRID_SIZE, "samples of the prior"),
            "traversals": lambda: vae_plots.traversals(traversals, traversed),
        }
        if means.shape[1] == 2:
            labels, names = dataset.test.get("label", np.full(1, -1))[: len(means)], dataset.label_names
            if labels.min() < 0:
                labels, names = np.zeros(len(means)), ("unlabeled",)
            drawings["latents"] = lambda: plots.scatter(means, labels, names, "means of q(z|x), test set")
        return drawings


def _keys(key: jax.Array, index: jax.Array, purpose: int) -> jax.Array:
    """Folds each example's number into the key, [b]: its draws do not depend on the rest of the batch."""
    return jax.vmap(lambda number: jax.random.fold_in(jax.random.fold_in(key, purpose), number))(index)
