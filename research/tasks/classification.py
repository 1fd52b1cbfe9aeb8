"""Image classification by softmax or binary cross-entropy."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from research import plots
from research.config import AugmentConfig, Config, option
from research.data import augmentation, images, mixing
from research.data.batch import Batch
from research.data.sources import Dataset
from research.errors import UserError
from research.tasks import calibration, class_table, classification_loss, label_checks
from research.tasks.task import Examples, ExportedFunction, Inputs, Metrics, Task

_TOP, _MIN_CLASSES = 5, 10  # top-5 accuracy is reported for sets of more than 10 classes


@dataclasses.dataclass
class ClassificationConfig(Config):
    """The fields that image classifiers share."""

    label_smoothing: float = option(
        0.0, "fraction of the target spread over all classes", minimum=0, below=1, step_input=True
    )
    loss: str = option(
        "softmax",
        "training loss: cross-entropy of the softmax, or of a sigmoid for each class, as the mean over all classes",
        choices=("softmax", "sigmoid"),
    )
    target_threshold: float = option(
        0.0,
        "loss=sigmoid: an image that is mixed (mixup, cutmix) has each class whose part of the label is above this as "
        "a whole target; 0: in proportion",
        minimum=0,
        below=1,
    )
    mirror: bool = option(
        False, "evaluate with the mean logits of each image and its mirror image", may_change="evaluation"
    )
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)


def check(config: ClassificationConfig, dataset: Dataset) -> None:
    """Raises `UserError` if the augmentation or the loss does not fit the data set, the batches or each other."""
    image_shape = dataset.train["image"].shape[1:]
    augmentation.check(config.augment, image_shape, len(dataset.label_names), config.examples_at_once)
    if not config.target_threshold:
        return
    threshold = f"--config.target_threshold={config.target_threshold}"
    if config.loss != "sigmoid" or not mixing.is_mixed(config.augment):
        raise UserError(f"{threshold} needs --config.loss=sigmoid, and --config.augment.mixup or cutmix")
    if config.label_smoothing:
        raise UserError(
            f"{threshold} makes every target 0 or 1, so --config.label_smoothing={config.label_smoothing} is without "
            "an effect: set one of the two to 0"
        )


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Image classification, with augmentation, label smoothing and test-time views.

    Evaluation and prediction use the softmax, whichever the training loss is, so the probabilities sum to 1.

    Attributes:
      network: builds the network from its rngs; `network(images, train=..., key=...)` returns logits [b, classes].
      mean, std: the training set's statistics of each channel, for values in 0..1.
      augment: the augmentation of training images.
      label_smoothing: fraction of the target spread evenly over all classes in training (Szegedy et al. 2016, section
        7).
      loss, target_threshold: of training (`research.tasks.classification_loss`).
      mirror, translate: whether evaluation averages the logits over mirrored and shifted views (`_test_time_views`).
    """

    per_device_gradients: ClassVar[bool] = True
    per_example: ClassVar[tuple[str, ...]] = ("label", "prediction", "confidence", "rank")

    network: Callable[[nnx.Rngs], nnx.Module]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    label_smoothing: float = 0.0
    mirror: bool = False
    translate: bool = False
    loss: str = "softmax"
    target_threshold: float = 0.0

    @classmethod
    def from_config(
        cls,
        network: Callable[[nnx.Rngs], nnx.Module],
        config: ClassificationConfig,
        dataset: Dataset,
        *,
        translate: bool = False,
    ) -> Self:
        """Builds the task of a network, with the config's fields and the statistics of the data set's images."""
        return cls(
            network,
            *dataset.statistic(images.channel_statistics, "image"),
            augment=config.augment,
            label_smoothing=config.label_smoothing,
            mirror=config.mirror,
            translate=translate,
            loss=config.loss,
            target_threshold=config.target_threshold,
        )

    def with_hparams(self, hparams: Mapping[str, Any]) -> "Classification":
        """Returns this task with the label smoothing and the strengths of augmentation of a step."""
        prefix = "augment."
        strengths = {path.removeprefix(prefix): value for path, value in hparams.items() if path.startswith(prefix)}
        return dataclasses.replace(
            self,
            label_smoothing=hparams.get("label_smoothing", self.label_smoothing),
            augment=dataclasses.replace(self.augment, **strengths),
        )

    def check_data(self, dataset: Dataset) -> None:
        """Raises `UserError` if the labels are not suitable, see `label_checks.check`."""
        label_checks.check(dataset)

    def evaluate(self, model: nnx.Module, batch: Batch, *, key: jax.Array, train: bool) -> Metrics:
        """Computes each example's cross-entropy in nats and accuracy; augmentation and smoothing are for training only.

        Evaluation adds the top-5 accuracy (for more than 10 classes), the calibration, the prediction with its
        probability, and the label's rank: the number of classes with larger logits.

        Args:
          model: the network.
          batch: "image" uint8 [b, h, w, c] and "label" int [b].
          key: for augmentation and dropout.
          train: whether this is training.
        """
        if train:
            return self._train(model, batch, key)
        labels = batch["label"]
        logits = self._classify(model, batch.features)["logits"]
        predictions, confidences = logits.argmax(-1), jax.nn.softmax(logits).max(-1)
        correct = (predictions == labels).astype(jnp.float32)
        rank = (logits > jnp.take_along_axis(logits, labels[:, None], -1)).sum(-1)
        top5 = {"top5_accuracy": (rank < _TOP).astype(jnp.float32)} if logits.shape[-1] > _MIN_CLASSES else {}
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": correct,
            **top5,
            "excess_confidence": calibration.excess_confidence(confidences, correct),
            "label": labels,
            "prediction": predictions,
            "confidence": confidences,
            "rank": rank,
        }

    def _train(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Metrics:
        augment_key, key = jax.random.split(key)
        inputs, mixed = augmentation.augment(batch, augment_key, self.augment, self.mean, self.std)
        logits = self._logits(model, inputs, train=True, key=key)
        targets = batch["label"] if mixed is None else mixed
        if self.loss == "sigmoid":
            loss = classification_loss.sigmoid(logits, targets, self.label_smoothing, self.target_threshold)
        else:
            loss = classification_loss.softmax(logits, targets, self.label_smoothing)
        return {"loss": loss, "accuracy": classification_loss.accuracy(logits, targets)}

    def _logits(self, model: Any, inputs: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        if train:
            return model(inputs, train=True, key=key)
        weights, views = zip(*self._test_time_views(inputs))
        if len(views) == 1:
            return model(inputs, train=False)
        logits = jax.lax.map(lambda view: model(view, train=False), jnp.stack(views))
        return jnp.tensordot(jnp.array(weights), logits, 1)

    def _test_time_views(self, inputs: jax.Array) -> list[tuple[float, jax.Array]]:
        """Returns (weight, view) pairs of the views that evaluation averages over (Jordan 2024, section 3.5).

        `translate` adds the images [b, h, w, c] shifted by a pixel up and left, and down and right, with half the
        weight of the original; `mirror` adds the mirror image of each view.
        """
        views = [(1.0, inputs)]
        if self.translate:
            padded = jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
            views = [(0.5, inputs), (0.25, padded[:, :-2, :-2]), (0.25, padded[:, 2:, 2:])]
        if self.mirror:
            views = [(weight / 2, image) for weight, view in views for image in (view, view[:, :, ::-1])]
        return views

    def functions(self, model: nnx.Module, dataset: Dataset) -> dict[str, ExportedFunction]:
        """Exports `classify`: "image" uint8 [b, h, w, c] to the "logits" of evaluation, float32 [b, classes]."""
        shape = ", ".join(map(str, dataset.test["image"].shape[1:]))
        preprocessing = f"(image / 255 - mean) / std by channel, mean {self.mean}, std {self.std}"
        if self.mirror or self.translate:
            views = [*["mirrored"] * self.mirror, *["shifted by a pixel"] * self.translate]
            preprocessing += f"; the logits are averaged over the image as it is and {' and '.join(views)}"
        return {"classify": ExportedFunction(self._classify, {"image": (f"b, {shape}", "uint8")}, preprocessing)}

    def _classify(self, model: nnx.Module, inputs: Inputs) -> dict[str, jax.Array]:
        normalized = images.normalize(inputs["image"], self.mean, self.std)
        return {"logits": self._logits(model, normalized, train=False, key=None)}

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """As the base class, with the expected calibration error (`research.tasks.calibration`) of an evaluation."""
        excess = means.get("excess_confidence")
        metrics = super().summarize({name: mean for name, mean in means.items() if name != "excess_confidence"})
        return metrics if excess is None else metrics | {"calibration_error": float(np.abs(excess).sum())}

    def evaluation_plots(self, examples: Examples, dataset: Dataset) -> dict[str, Callable[[], Any]]:
        """Plots confusions, calibration and the most confident mistakes of the whole test set."""
        if not examples:  # of a subclass with an `evaluate` of its own
            return {}
        labels, predictions, confidences = (examples[name] for name in ("label", "prediction", "confidence"))
        names = dataset.label_names

        def mistakes() -> Any:
            numbers = plots.most_confident_mistakes(labels, predictions, confidences)
            images = dataset.test["image"][examples["index"][numbers]]
            return plots.mistakes(images, numbers, labels, predictions, confidences, names)

        return {
            "confusion": lambda: plots.confusion(labels, predictions, names),
            "reliability": lambda: plots.reliability(confidences, predictions == labels, calibration.NUM_BINS),
            "examples": mistakes,
        }

    def tables(self, examples: Examples, dataset: Dataset) -> dict[str, str]:
        """Returns classes.csv, over the whole test set."""
        if not examples:
            return {}
        top5 = examples["rank"] < _TOP if len(dataset.label_names) > _MIN_CLASSES else None
        return {"classes": class_table.make(examples["label"], examples["prediction"], top5, dataset.label_names)}
