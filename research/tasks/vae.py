"""Images by variational autoencoders: bounds of the log-likelihood, and its estimate by importance sampling."""

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
from research.data.pipeline import Batch
from research.data.sources import Dataset
from research.randomness import Stream
from research.tasks import densities
from research.tasks.predictor import Predictor
from research.tasks.task import Function, Metrics, Task

_ACTIVE = 0.01  # Burda et al. 2016, section 5.2
_EVAL_BATCH = 1000  # examples whose log-likelihood is estimated together
_SHOWN = 10  # images in a row of a picture, and latents traversed
_STEPS = np.linspace(-3, 3, 11, dtype=np.float32)  # of a traversal: nearly all of the prior's mass
_TARGETS, _LATENTS, _DRAWN = 0, 1, 2  # what a key is for


@dataclasses.dataclass(frozen=True)
class VAE(Task):
    """Images by a variational autoencoder (Kingma & Welling 2014, arXiv 1312.6114). All figures are in nats.

    A bernoulli likelihood is one of bits: a pixel is 1 with the probability that its grey value says, drawn at every
    visit ("stochastic", as in Burda et al. 2016) or once ("fixed"). A gaussian one is a density of grey + u, u uniform
    in 0..1, on the scale 0..256, so that its log-likelihood is a lower bound of that of the 8-bit values (Theis et al.
    2016, arXiv 1511.01844, section 3.1) and bits per dimension mean the usual.

    Attributes:
      network: builds the network from its rngs: `research.models.vae.VAE`, or what has its two methods.
      image_shape: (h, w, c).
      likelihood: "bernoulli" or "gaussian".
      binarize: "stochastic" or "fixed"; of a gaussian likelihood "".
      samples: k of the training bound. 1: the ELBO, with the KL in closed form; more: IWAE (Burda et al., equation 8).
      gradient_samples: of several samples, by how many the gradient is estimated, without bias; 0: by all, exactly.
      beta: weight of the KL in training (Higgins et al. 2017); with several samples, of log p(z) - log q(z|x).
      warmup_steps: updates over which that weight rises linearly from 0.
      free_bits: nats below which a latent's KL, mean over the batch, costs the same (Kingma et al. 2016, equation 15).
      final_samples: of the log-likelihood's estimate at the end of training; 0: none is made.
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

    def with_inputs(self, inputs: Mapping[str, Any]) -> "VAE":
        """With the weight of the KL and the free bits that are given."""
        return dataclasses.replace(self, **{name: inputs[name] for name in ("beta", "free_bits") if name in inputs})

    def evaluate(self, model: Any, batch: Batch, *, key: jax.Array, train: bool) -> Metrics:
        """The negative bound of every example, and its parts.

        Evaluation gives the ELBO whatever training optimises, by draws that depend on an example's number only, so that
        batches and devices do not matter.

        Args:
          model: the network.
          batch: "image" uint8 [b, h, w, c], "index" int32 [b], and in training "step" int32 scalar.
          key: for binarisation and latents in training.
          train: whether this is training.

        Returns:
          "loss", "reconstruction" (-log p(x|z)), "kl" and "elbo", [b] each; in evaluation also "mean" and
          "squared_mean" of the latents' means, [b, latents], for `summarize`.
        """
        key = key if train else randomness.key(Stream.EVALUATION)
        # Not by the keys of evaluation: a training and a test image of the same number would share their thresholds.
        fixed = train and self.binarize == "fixed"
        targets = self.targets(batch, randomness.key(Stream.FIXED_BITS) if fixed else key)
        mean, logvar = model.encode(targets)
        shape = (self.samples if train else 1, mean.shape[-1])
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(key, batch, _LATENTS))
        log_prob, log_ratio = self._log_weights(model, targets, mean, logvar, noise)
        kl = densities.kl_to_standard(mean, logvar)
        reconstruction = -log_prob.mean(1)
        loss = reconstruction + kl.sum(-1)
        values = {"loss": loss, "reconstruction": reconstruction, "kl": kl.sum(-1), "elbo": -loss}
        if not train:
            return values | {"mean": mean, "squared_mean": jnp.square(mean)}
        beta = self.beta * jnp.minimum(1.0, (batch["step"] + 1) / max(self.warmup_steps, 1))
        if self.samples > 1:
            log_weights = log_prob + beta * log_ratio
            bound = jax.nn.logsumexp(log_weights, axis=1) - math.log(self.samples)
            if self.gradient_samples:
                # The bound's gradient is the mean of those of log w under the normalised weights (Burda et al.,
                # equation 14), so samples drawn by these give it without bias, and only they are taken backwards.
                keys = _keys(key, batch, _DRAWN)
                weights = jax.lax.stop_gradient(log_weights)
                drawn = jax.vmap(lambda key, w: jax.random.categorical(key, w, shape=(self.gradient_samples,)))
                chosen = jnp.take_along_axis(noise, drawn(keys, weights)[..., None], 1)
                log_prob, log_ratio = self._log_weights(model, targets, mean, logvar, chosen)
                mean_log_weight = (log_prob + beta * log_ratio).mean(1)
                bound = jax.lax.stop_gradient(bound - mean_log_weight) + mean_log_weight
            return values | {"loss": -bound}
        # A latent whose mean over the batch is below the limit costs the limit in every example: the mean over the
        # batch is then max(limit, mean), and so is its gradient.
        if is_on(self.free_bits):
            kl = jnp.where(sharding.batch_mean(kl) < self.free_bits, self.free_bits, kl)
        return values | {"loss": reconstruction + beta * kl.sum(-1)}

    def _log_weights(
        self, model: Any, targets: jax.Array, mean: jax.Array, logvar: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """log p(x|z) and log p(z) - log q(z|x), [b, k] each, at the latents that noise [b, k, latents] makes."""
        latents = mean[:, None] + jnp.exp(logvar / 2)[:, None] * noise
        log_prob = self.log_prob(targets[:, None], model.decode(latents))
        return log_prob, densities.log_ratio(noise, latents, logvar[:, None])

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """Adds "bits_per_dim" of the ELBO and, in evaluation, "active_units": latents whose mean given x varies.

        A latent is active where the variance of E[z|x] over the examples is above 0.01 (Burda et al., section 5.2).
        """
        figures = {name: float(value) for name, value in means.items() if not np.ndim(value)}
        figures["bits_per_dim"] = -self._bits_per_dim(figures["elbo"])
        if "mean" in means:
            figures["active_units"] = float(np.sum(means["squared_mean"] - np.square(means["mean"]) > _ACTIVE))
        return figures

    def _bits_per_dim(self, nats: float) -> float:
        return nats / (math.prod(self.image_shape) * math.log(2))

    def targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """What the network is given and is to explain: float32 [b, h, w, c], bits or dequantised values in 0..1.

        Args:
          batch: "image" uint8 [b, h, w, c] and "index" int32 [b].
          key: of the draw, together with the example's number.
        """
        keys = _keys(key, batch, _TARGETS)
        if self.likelihood == "bernoulli":
            return jax.vmap(_bits)(keys, batch["image"])
        noise = jax.vmap(lambda key: jax.random.uniform(key, self.image_shape))(keys)
        return (batch["image"] + noise) / 256

    def log_prob(self, targets: jax.Array, parameters: jax.Array) -> jax.Array:
        """log p(x|z): targets [..., h, w, c], and what `decode` gives, to [...]."""
        flat = targets.reshape(*targets.shape[:-3], -1)
        if self.likelihood == "bernoulli":
            return densities.bernoulli(flat, parameters)
        # The density of values in 0..1, over 256 a pixel: that of values in 0..256.
        return densities.gaussian(flat, *jnp.split(parameters, 2, -1)) - flat.shape[-1] * math.log(256)

    def log_likelihood(self, model: Any, batch: Batch, _: jax.Array) -> jax.Array:
        """log p(x), [b], estimated by `final_samples` samples of q(z|x) (Burda et al., equation 8 with that k).

        The samples come one after another, each with a running sum of its weight, so memory does not grow with them.
        """
        key = randomness.key(Stream.EVALUATION)
        targets = self.targets(batch, key)
        mean, logvar = model.encode(targets)
        keys = _keys(key, batch, _LATENTS)

        def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            largest, total = carry
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), (1, mean.shape[1])))(keys)
            log_weight = jnp.add(*self._log_weights(model, targets, mean, logvar, noise))[:, 0]
            maximum = jnp.maximum(largest, log_weight)
            return maximum, total * jnp.exp(largest - maximum) + jnp.exp(log_weight - maximum)

        start = jnp.full(len(mean), -jnp.inf), jnp.zeros(len(mean))
        largest, total = jax.lax.fori_loop(0, self.final_samples, add, start)
        return largest + jnp.log(total) - math.log(self.final_samples)

    def final_metrics(self, predict: Predictor, dataset: Dataset) -> dict[str, float]:
        """ "test_nll": the mean of -log p(x) in nats over the test set, and the same in bits per dimension."""
        if not self.final_samples:
            return {}
        options = {"batch_size": _EVAL_BATCH, "progress": "test log-likelihood"}
        nll = -float(predict(self.log_likelihood, _numbered(dataset.test["image"]), **options).mean(dtype=np.float64))
        return {"test_nll": nll, "test_nll_bits_per_dim": self._bits_per_dim(nll)}

    def encoded(self, model: Any, batch: Batch, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What evaluation makes of images: their targets, and the mean of q(z|x), [b, latents]."""
        targets = self.targets(batch, randomness.key(Stream.EVALUATION))
        return targets, model.encode(targets)[0]

    def decoded(self, model: Any, batch: Batch, _: jax.Array) -> jax.Array:
        """The expected images given "latents" [b, latents]: float32 [b, h, w, c] in 0..1."""
        return self._expected(model.decode(batch["latents"]))

    def _expected(self, parameters: jax.Array) -> jax.Array:
        if self.likelihood == "bernoulli":
            expected = jax.nn.sigmoid(parameters)
        else:
            expected = jnp.clip(jnp.split(parameters, 2, -1)[0], 0, 1)
        return expected.reshape(-1, *self.image_shape)

    def functions(self, model: Any, dataset: Dataset) -> dict[str, Function]:
        """`encode`, `decode` and `sample`.

        encode: "image" uint8 [b, h, w, c] and "index" int32 [b] to "targets" float32 [b, h, w, c], which the network
          saw, and "mean" and "logvar" of q(z|x), float32 [b, latents]; the draws of evaluation.
        decode: "latents" float32 [b, latents] to the expected "image" float32 [b, h, w, c] in 0..1, and "parameters" of
          p(x|z).
        sample: "seed" uint32 scalar and "index" int32 [b] to "image", as `decode` gives it, of draws of the prior.
        """
        probe = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        latents = jax.eval_shape(model.encode, probe)[0].shape[1]

        def encode(model: Any, inputs: Batch) -> dict[str, jax.Array]:
            targets = self.targets(inputs, randomness.key(Stream.EVALUATION))
            mean, logvar = model.encode(targets)
            return {"targets": targets, "mean": mean, "logvar": logvar}

        def decode(model: Any, inputs: Batch) -> dict[str, jax.Array]:
            parameters = model.decode(inputs["latents"])
            return {"image": self._expected(parameters), "parameters": parameters}

        def sample(model: Any, inputs: Batch) -> dict[str, jax.Array]:
            keys = _keys(jax.random.key(inputs["seed"]), inputs, _LATENTS)
            drawn = jax.vmap(lambda key: jax.random.normal(key, (latents,)))(keys)
            return {"image": self._expected(model.decode(drawn))}

        image, index = ", ".join(map(str, ("b", *self.image_shape))), ("b", "int32")
        bits = "a pixel is 1 with the probability image / 255, else 0" if self.binarize else "(image + noise) / 256"
        return {
            "encode": Function(
                encode, {"image": (image, "uint8"), "index": index}, f"{bits}, by a draw that `index` decides"
            ),
            "decode": Function(decode, {"latents": (f"b, {latents}", "float32")}, "none"),
            "sample": Function(
                sample, {"seed": ("", "uint32"), "index": index}, "`seed` and `index` decide the latents of an image"
            ),
        }

    def draw_prior(self, predict: Predictor, latents: int, count: int, seed: int = 0) -> np.ndarray:
        """The expected images given `count` draws of the prior: float32 [count, h, w, c] in 0..1."""
        draws = randomness.generator(Stream.PRIOR_SAMPLES, seed).standard_normal((count, latents)).astype(np.float32)
        return predict(self.decoded, {"latents": draws})

    def pictures(self, predict: Predictor, dataset: Dataset) -> dict[str, Callable[[], Any]]:
        """Reconstructions of test images, samples, traversals of the latents; two latents are shown by label."""
        targets, means = predict(self.encoded, _numbered(dataset.test["image"]))
        shown = len(targets[: 5 * _SHOWN])
        pairs = np.stack([targets[:shown], predict(self.decoded, {"latents": means[:shown]})], 1)
        samples = self.draw_prior(predict, means.shape[1], _SHOWN**2)
        traversed = np.argsort(-means.var(0), kind="stable")[:_SHOWN]
        latents = np.tile(means[0], (len(traversed), len(_STEPS), 1))
        for row, latent in enumerate(traversed):
            latents[row, :, latent] = _STEPS
        traversals = predict(self.decoded, {"latents": latents.reshape(-1, means.shape[1])})
        pictures: dict[str, Callable[[], Any]] = {
            "reconstructions": lambda: plots.image_grid(
                pairs.reshape(-1, *self.image_shape), _SHOWN, "test images, each with its reconstruction to the right"
            ),
            "samples": lambda: plots.image_grid(samples, _SHOWN, "samples of the prior"),
            "traversals": lambda: plots.image_grid(
                traversals,
                len(_STEPS),
                f"rows: latents {', '.join(map(str, traversed))} from {_STEPS[0]:g} to {_STEPS[-1]:g}",
            ),
        }
        if means.shape[1] == 2:
            labels, names = dataset.test["label"], dataset.label_names
            pictures["latents"] = lambda: plots.scatter(means, labels, names, "means of q(z|x), test set")
        return pictures


def _keys(key: jax.Array, batch: Batch, purpose: int) -> jax.Array:
    """A key for each example, [b], by its number: the draws do not depend on the batch around it."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, purpose), index))(batch["index"])


def _bits(key: jax.Array, image: jax.Array) -> jax.Array:
    """Float32 bits, each 1 with the probability that its pixel's grey value (uint8) says, to within 2^-17.

    Half a random word is enough for a pixel: drawing is a good part of a small network's train step.
    """
    words = jax.random.bits(key, (-(-image.size // 2),))
    halves = jnp.concatenate([words & 0xFFFF, words >> 16])[: image.size].reshape(image.shape)
    return (halves < (image.astype(jnp.uint32) * 65536 + 127) // 255).astype(jnp.float32)


def _numbered(images: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": images, "index": np.arange(len(images), dtype=np.int32)}
