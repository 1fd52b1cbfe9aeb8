"""The works in Flax, in the style of its examples: `nnx.Optimizer`, a train step under `nnx.jit`, a call per batch.

XLA has its default flags; none of this project's flags and layers are used.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.peers import works
from benchmarks.peers.clock import Clock


class CNN(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", dtype=dtype, rngs=rngs)
        self.conv1, self.conv2, self.conv3 = conv(3, 32), conv(32, 64), conv(64, 64)
        self.hidden, self.logits = nnx.Linear(1024, 64, dtype=dtype, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = nnx.relu(self.conv3(x))
        return self.logits(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Block(nnx.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, outputs, momentum=0.9, rngs=rngs)
        self.conv1 = conv(inputs, outputs, (3, 3), stride, padding=1)
        self.conv2 = conv(outputs, outputs, (3, 3), padding=1)
        self.shortcut = conv(inputs, outputs, (1, 1), stride, padding=0) if stride > 1 else None
        self.norm1, self.norm2 = norm(), norm()
        self.shortcut_norm = norm() if stride > 1 else None

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 64, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        blocks, inputs = [], 64
        for channels, stride in works.RESNET_GROUPS:
            blocks += [Block(inputs, channels, stride, rngs), Block(channels, channels, 1, rngs)]
            inputs = channels
        self.blocks, self.logits = nnx.List(blocks), nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.logits(x.mean((1, 2)))


class LSTM(nnx.Module):
    def __init__(self, vocabulary: int, width: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.lstm: Any = nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs))
        self.logits = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        return self.logits(self.lstm(self.embedding(tokens)))


class VAE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def mlp(inputs: int, outputs: int) -> nnx.Sequential:
            linear = partial(nnx.Linear, rngs=rngs)
            return nnx.Sequential(linear(inputs, 200), nnx.tanh, linear(200, 200), nnx.tanh, linear(200, outputs))

        self.encoder, self.decoder = mlp(784, 2 * works.VAE_LATENTS), mlp(works.VAE_LATENTS, 784)
        self.rngs = nnx.Rngs(0)

    def __call__(self, grays):
        bits = jax.random.bernoulli(self.rngs(), grays).astype(jnp.float32)
        mean, logvar = jnp.split(self.encoder(bits), 2, -1)
        logits = self.decoder(mean + jnp.exp(logvar / 2) * jax.random.normal(self.rngs(), mean.shape))
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, bits).sum(-1)
        return reconstruction + 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).sum(-1)


def _program(work: works.Work, arrays: dict[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
    """Returns the network and the examples, targets last."""
    rngs = nnx.Rngs(0)
    if work.network == "vae":
        return VAE(rngs), [arrays["image"].reshape(len(arrays["image"]), -1) / np.float32(255)]
    if work.network == "lstm":
        tokens = arrays["tokens"].astype(np.int32)
        return LSTM(len(arrays["w0"]), work.width, rngs), [tokens[:, :-1], tokens[:, 1:]]
    model = CNN(jnp.dtype(work.dtype), rngs) if work.network == "cnn" else ResNet(rngs)
    return model, [works.normalized(arrays), arrays["label"]]


def _parameters(model: Any) -> list[Any]:
    """Returns the parameters that get an initial weight, in the order of the forward pass."""
    if isinstance(model, LSTM):
        cell = model.lstm.cell
        embedding, logits = model.embedding.embedding, model.logits
        return [embedding, cell.dense_i.kernel, cell.dense_h.kernel, cell.dense_h.bias, logits.kernel, logits.bias]
    if isinstance(model, VAE):
        layers = [layer for mlp in (model.encoder, model.decoder) for layer in mlp.layers if hasattr(layer, "kernel")]
    elif isinstance(model, CNN):
        layers = [model.conv1, model.conv2, model.conv3, model.hidden, model.logits]
    else:
        convs = [conv for block in model.blocks for conv in (block.conv1, block.conv2, block.shortcut)]
        layers = [model.stem, *filter(None, convs), model.logits]
    return [p for layer in layers for p in (layer.kernel, layer.bias) if p is not None]


def _loaded(work: works.Work, arrays: dict[str, np.ndarray]) -> tuple[Any, list[np.ndarray]]:
    """Returns the network with its initial weights, and the examples."""
    model, examples = _program(work, arrays)
    for parameter, weight in zip(_parameters(model), works.weights(arrays), strict=True):
        parameter[...] = jnp.asarray(weight)
    return model, examples


def evaluate(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Evaluates the examples repeatedly and records each pass."""
    del variant
    model, examples = _loaded(work, arrays)

    @nnx.jit
    def eval_step(model: Any, inputs: Any, targets: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

    def once() -> float:
        starts = range(0, len(examples[0]), work.batch_size)
        batches = ([x[first : first + work.batch_size] for x in examples] for first in starts)
        return float(jnp.stack([eval_step(model, *batch) for batch in batches]).mean())

    clock.passes(epochs, once)


def sample(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Continues each example's first characters by the most likely ones, repeatedly, and records each pass."""
    del variant
    model, (inputs, _) = _loaded(work, arrays)

    @nnx.jit
    def prompt(model: Any, tokens: Any) -> tuple[Any, jax.Array]:
        carry, outputs = model.lstm(model.embedding(tokens), return_carry=True)
        return carry, model.logits(outputs[:, -1]).argmax(-1)

    @nnx.jit
    def step(model: Any, carry: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        carry, output = model.lstm.cell(carry, model.embedding(token))
        return carry, model.logits(output).argmax(-1)

    def once() -> float:
        carry, token = prompt(model, inputs[:, : works.PROMPT])
        tokens = [token]
        while len(tokens) < works.SEQUENCE:
            carry, token = step(model, carry, token)
            tokens.append(token)
        return float(jnp.stack(tokens).mean())

    clock.passes(epochs, once)


def train(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Trains and records the epochs."""
    del variant
    model, examples = _loaded(work, arrays)
    optimizer = nnx.Optimizer(model, optax.adam(works.LEARNING_RATE, eps=works.EPSILON), wrt=nnx.Param)

    def loss_fn(model: Any, *batch: Any) -> jax.Array:
        if work.network == "vae":
            return model(*batch).mean()
        inputs, targets = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

    @nnx.jit
    def train_step(model: Any, optimizer: nnx.Optimizer, *batch: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_fn)(model, *batch)
        optimizer.update(model, grads)
        return loss

    for _ in range(epochs):
        losses, start = [], time.monotonic()
        for first in range(0, len(examples[0]), work.batch_size):
            losses.append(train_step(model, optimizer, *(x[first : first + work.batch_size] for x in examples)))
            if not clock.first_step_seconds:
                losses[0].block_until_ready()
            clock.step()
        clock.epoch(float(jnp.stack(losses).mean()), time.monotonic() - start)
