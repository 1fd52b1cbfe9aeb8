"""The works in this project: its configs, tasks and train step, from given weights, without workdir and checkpoints."""

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.peers import works
from benchmarks.peers.clock import Clock
from experiments import char_rnn, cifar_cnn, mnist_vae
from experiments.char_rnn import CharRNNConfig
from experiments.cifar_cnn import CifarConfig
from experiments.mnist_vae import MnistVAEConfig
from launch.plans.hlo import Program
from research import app, sharding
from research.config import CNNConfig, Config, OptimizerConfig, RNNConfig, VAEConfig
from research.data.sources import Dataset
from research.experiment import Experiment
from research.models import rnn
from research.tasks.generation import generate
from research.training.run import Training

_MICROBATCH = 32  # on a CPU, so that activations stay in its cache


def _parameters(model: Any, network: str) -> list[nnx.Param]:
    """Returns the parameters that get an initial weight, in the order of the forward pass."""
    if network == "lstm":
        (layer,) = model.layers
        return [model.embedding.embedding, layer.inputs.kernel, layer.kernel, layer.bias, model.kernel, model.bias]
    if network == "transformer":
        names = ("query", "key", "value", "outputs", "gate", "expand", "contract")
        kernels = [getattr(block, name).kernel for block in model.blocks for name in names]
        return [model.embedding.embedding, *kernels, model.kernel]
    if network == "vae":
        encoder, decoder = model.encoder, model.decoder
        hidden = [*encoder.hidden, encoder.out, *decoder.hidden]
        return [*(p for layer in hidden for p in (layer.kernel, layer.bias)), decoder.out.kernel, model.bias]
    if network == "hierarchical_vae":
        groups = [p for group in model.groups for p in _group_parameters(group)]
        blocks = [p for block in model.bottom_up_blocks for p in _block_parameters(block)]
        return [model.stem.kernel, model.stem_bias.bias, *blocks, *groups, model.out.kernel, model.bias]
    if network == "cnn":
        convs = [p for conv, norm in zip(model.convs, model.norms) for p in (conv.kernel, norm.layer.bias)]
        return [*convs, *(p for layer in (model.hidden, model.logits) for p in (layer.kernel, layer.bias))]
    convs = [conv for block in model.blocks for conv in (block.conv1, block.conv2, block.shortcut) if conv]
    return [model.stem.kernel, *(conv.kernel for conv in convs), model.logits.kernel, model.logits.bias]


def _group_parameters(group: Any) -> list[nnx.Param]:
    prior = [*_block_parameters(group.prior), group.prior_head.kernel, group.prior_head.bias] if group.prior else []
    project, (block,) = group.project, group.blocks
    return [*prior, *_block_parameters(group.posterior), project.kernel, project.bias, *_block_parameters(block)]


def _block_parameters(block: Any) -> list[nnx.Param]:
    reduce, expand = block.reduce, block.expand
    return [reduce.kernel, reduce.bias, block.conv.kernel, block.bias.bias, expand.kernel, expand.bias]


def _config(work: works.Work, epochs: int) -> tuple[Config, Experiment]:
    options: dict[str, Any] = {
        "num_epochs": epochs,
        "batch_size": work.batch_size,
        "optimizer": OptimizerConfig(name="adam", learning_rate=works.LEARNING_RATE),
    }
    match work.network:
        case "lstm" | "transformer":
            layers = 1 if work.network == "lstm" else works.TRANSFORMER_LAYERS
            model = RNNConfig(name=work.network, width=work.width, layers=layers, dtype=work.dtype)
            return CharRNNConfig(sequence_length=works.SEQUENCE, model=model, **options), char_rnn.EXPERIMENT
        case "vae" | "hierarchical_vae":
            model = mnist_vae.hierarchical().model if work.network == "hierarchical_vae" else VAEConfig()
            model.dtype = work.dtype
            return MnistVAEConfig(final_samples=0, model=model, **options), mnist_vae.EXPERIMENT
        case "cnn":
            small = jax.default_backend() == "cpu" and work.batch_size > _MICROBATCH
            model, size = CNNConfig(dtype=work.dtype), _MICROBATCH if small else 0
            return CifarConfig(microbatch_size=size, model=model, **options), cifar_cnn.EXPERIMENT
        case _:
            # No microbatches, so that batch norm has the same statistics as in the peers.
            return CifarConfig(model=CNNConfig(name="resnet", dtype=work.dtype), **options), cifar_cnn.EXPERIMENT


def _dataset(work: works.Work, arrays: dict[str, np.ndarray]) -> Dataset:
    if work.reads_text:
        count = len(arrays["tokens"])
        lengths = np.full(count, works.SEQUENCE, np.int32)
        train = {"tokens": arrays["tokens"], "first": np.ones(count, bool), "count": lengths}
        labels = tuple(map(str, range(len(arrays["w0"]))))
    else:
        images = arrays["image"]
        train = {"image": images, "label": arrays.get("label", np.zeros(len(images))).astype(np.int32)}
        labels = tuple(map(str, range(10)))
    test = {name: array if work.does == "evaluate" else array[: work.batch_size] for name, array in train.items()}
    return Dataset(work.network, labels, train, None, test, shuffle=False)


def _training(work: works.Work, arrays: dict[str, np.ndarray], epochs: int) -> Training:
    config, experiment = _config(work, epochs)
    dataset = _dataset(work, arrays)
    config = experiment.resolve(config, dataset)
    task = experiment.make_task(config, dataset)
    mesh = sharding.make_mesh(config)
    original: Any = task

    def network(rngs: nnx.Rngs) -> Any:
        model = original.network(rngs)
        for parameter, weight in zip(_parameters(model, work.network), works.weights(arrays), strict=True):
            assert weight.shape[-parameter.ndim :] == parameter.shape  # a 1x1 convolution is a dense layer here
            parameter[...] = jnp.asarray(weight).reshape(parameter.shape)
        return model

    with jax.set_mesh(mesh):
        return Training(config, dataclasses.replace(original, network=network), dataset, mesh)


def train(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Trains and records the epochs."""
    del variant
    training = _training(work, arrays, epochs)
    with jax.set_mesh(training.mesh):
        training.compile(train=True)
        seconds, previous = 0.0, 0
        for end in training.epoch_end_steps:
            total = 0.0
            for _, values in training.dispatches(end):
                clock.step()
                total += values["loss"].sum(dtype=np.float64)
            clock.epoch(total / (end - previous), training.progress.train_seconds - seconds)
            seconds, previous = training.progress.train_seconds, end
        clock.step_flops = Program(training.train_program.as_text()).cost()["flops"]


def evaluate(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Evaluates the examples repeatedly and records each pass."""
    del variant
    training = _training(work, arrays, 1)
    with jax.set_mesh(training.mesh):
        training.compile(train=False)
        clock.passes(epochs, lambda: training.evaluate()["test_loss"])


def sample(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Continues each example's first characters by the most likely ones, repeatedly, and records each pass."""
    del variant
    training = _training(work, arrays, 1)
    predict, model_config = training.predictor(), training.config.model  # pyright: ignore[reportAttributeAccessIssue]

    def texts(model: nnx.Module, batch: Any, key: jax.Array) -> jax.Array:
        carry = rnn.initial_carry(model_config, work.batch_size)
        return generate(model, batch["prompt"], carry, key, length=works.SEQUENCE, temperature=0, top_p=1)

    prompt = {"prompt": arrays["tokens"][:, : works.PROMPT].astype(np.int32)}
    clock.passes(epochs, lambda: float(predict(texts, prompt).mean()))


def command(work: works.Work, arrays: dict[str, np.ndarray], variant: str, epochs: int, clock: Clock) -> None:
    """Runs `python -m experiments.cifar_cnn --config=tutorial` and records its steps and epochs."""
    del work, arrays, variant
    dispatches = Training.dispatches

    def timed(self: Training, end: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for done in dispatches(self, end):
            clock.step()
            yield done

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = ["--config=tutorial", "--config.dataset.name=cifar10", f"--config.num_epochs={epochs}"]
        with mock.patch.object(Training, "dispatches", timed):
            summary = app.run(cifar_cnn.EXPERIMENT, [*args, f"--workdir={folder}/run"])
        rows = map(json.loads, (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [row["train_loss"] for row in rows if "train_loss" in row]
    for loss in losses:
        clock.epoch(loss, summary["train_seconds"] / epochs)
