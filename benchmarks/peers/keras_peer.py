"""The works in Keras by `model.fit`, compiled by XLA; `+graph`: without XLA; `+jax`: on Keras's JAX backend.

The backend is chosen by the environment before Keras is imported (`KERAS_BACKEND`).
"""

import time
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.peers import works
from benchmarks.peers.clock import Clock


def cnn(channels: int = 3) -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((32, 32, channels)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, dtype="float32"),
        ]
    )


def _resnet() -> keras.Model:
    def conv(x: Any, channels: int, size: int, stride: int) -> Any:
        # Padded as in PyTorch, by size // 2 on all sides: "same" differs for a stride of 2.
        x = layers.ZeroPadding2D(size // 2)(x) if size > 1 else x
        x = layers.Conv2D(channels, size, stride, use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    inputs = layers.Input((32, 32, 3))
    x = layers.ReLU()(conv(inputs, 64, 3, 1))
    for channels, stride in works.RESNET_GROUPS:
        for block_stride in (stride, 1):
            y = layers.ReLU()(conv(x, channels, 3, block_stride))
            y = conv(y, channels, 3, 1)
            x = layers.ReLU()(y + (conv(x, channels, 1, block_stride) if block_stride > 1 else x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


def _lstm(vocabulary: int, width: int) -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((works.SEQUENCE,), dtype="int32"),
            layers.Embedding(vocabulary, width),
            layers.LSTM(width, return_sequences=True),
            layers.Dense(vocabulary, dtype="float32"),
        ]
    )


class VAE(keras.Model):
    def __init__(self):
        super().__init__()

        def mlp(inputs: int, outputs: int) -> keras.Model:
            hidden = [layers.Dense(200, activation="tanh") for _ in range(2)]
            return keras.Sequential([layers.Input((inputs,)), *hidden, layers.Dense(outputs)])

        self.encoder, self.decoder = mlp(784, 2 * works.VAE_LATENTS), mlp(works.VAE_LATENTS, 784)
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, grays: Any) -> Any:
        bits = ops.cast(keras.random.uniform(ops.shape(grays), seed=self.seeds) < grays, "float32")
        mean, logvar = ops.split(self.encoder(bits), 2, -1)
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        logits = self.decoder(mean + ops.exp(logvar / 2) * noise)
        reconstruction = ops.sum(ops.softplus(logits) - bits * logits, -1)
        kl = 0.5 * ops.sum(ops.square(mean) + ops.exp(logvar) - 1 - logvar, -1)
        self.add_loss(ops.mean(reconstruction + kl))
        return logits


class _Times(keras.callbacks.Callback):
    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.start = clock, 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        self.clock.step()

    def on_epoch_end(self, epoch, logs=None):
        assert logs is not None
        self.clock.epoch(float(logs["loss"]), time.monotonic() - self.start)


def _program(work: works.Work, arrays: dict[str, np.ndarray]) -> tuple[keras.Model, list[np.ndarray]]:
    """Returns the network and the examples."""
    if work.network == "vae":
        model = VAE()
        grays = arrays["image"].reshape(len(arrays["image"]), -1) / np.float32(255)
        model(grays[:1])  # builds the variables
        return model, [grays]
    if work.network == "lstm":
        tokens = arrays["tokens"].astype(np.int32)
        return _lstm(len(arrays["w0"]), work.width), [tokens[:, :-1], tokens[:, 1:]]
    return cnn() if work.network == "cnn" else _resnet(), [works.normalized(arrays), arrays["label"]]


def _compiled(work: works.Work, arrays: dict[str, np.ndarray], variant: str) -> tuple[keras.Model, list[np.ndarray]]:
    """Returns the compiled network with its initial weights, and the examples."""
    if work.dtype == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model, examples = _program(work, arrays)
    for variable, weight in zip(model.trainable_variables, _in_order(model, works.weights(arrays)), strict=True):
        variable.assign(weight)
    loss = None if work.network == "vae" else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(works.LEARNING_RATE, epsilon=works.EPSILON)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False if variant == "graph" else "auto")
    return model, examples


def train(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Trains and records the epochs."""
    model, examples = _compiled(work, arrays, variant)
    options = {"batch_size": work.batch_size, "epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(*examples, callbacks=[_Times(clock)], **options)


def evaluate(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Evaluates the examples repeatedly and records each pass."""
    model, examples = _compiled(work, arrays, variant)
    clock.passes(epochs, lambda: float(model.evaluate(*examples, batch_size=work.batch_size, verbose=0)))


def _in_order(model: keras.Model, weights: works.Arrays) -> works.Arrays:
    """Returns the weights in the order of the model's variables; batch norms keep their own values."""
    kernels = iter(weights)
    return [v.numpy() if v.name in ("gamma", "beta") else next(kernels) for v in model.trainable_variables]
