"""Character-level language models on Shakespeare: recurrent, with the state carried from batch to batch, or not.

python -m experiments.char_rnn                    minGRU: parallel over time
python -m experiments.char_rnn --config=lru       the linear recurrent unit: parallel over time
python -m experiments.char_rnn --config=lstm      sequential cells; also --config=gru and --config=simple
python -m experiments.char_rnn --config=transformer   attends within a chunk of text
python -m experiments.char_rnn --workdir=DIR --mode=sample --prompt="ROMEO:"

The default reaches 1.398 nats per character on tiny_shakespeare's validation split and 1.539 on its test split (one
run, 8 epochs, 720 s of training on 2 x86 CPU cores with AVX-512, shared with other work).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from research import app
from research.config import Config, DatasetConfig, OptimizerConfig, RNNConfig, option
from research.data import text
from research.data.batch import Batch
from research.data.sources import Dataset
from research.errors import UserError
from research.models import text_networks
from research.parametrization import Network
from research.tasks.generation import SampleOptions, generate
from research.tasks.language_model import LanguageModel
from research.tasks.predictor import Predictor


@dataclasses.dataclass
class CharRNNConfig(Config):
    """A character language model; an example is a chunk of one of `batch_size` streams of text."""

    sequence_length: int = option(128, "tokens of a chunk: the length of truncated backpropagation", minimum=1)
    model: RNNConfig = dataclasses.field(default_factory=RNNConfig)


def get_config() -> CharRNNConfig:
    """Three minGRU layers."""
    return _config(RNNConfig(name="mingru", width=192, layers=3, dropout=0.1), learning_rate=0.003)


def lru() -> CharRNNConfig:
    """Three LRU layers."""
    return _config(RNNConfig(name="lru", width=256, layers=3, dropout=0.1), learning_rate=0.003)


def lstm() -> CharRNNConfig:
    """One LSTM layer."""
    return _config(RNNConfig(name="lstm", width=384, layers=1, dropout=0.1), learning_rate=0.004)


def gru() -> CharRNNConfig:
    """One GRU layer."""
    return _config(RNNConfig(name="gru", width=448, layers=1, dropout=0.1), learning_rate=0.004)


def simple() -> CharRNNConfig:
    """One layer of Elman's cell."""
    return _config(RNNConfig(name="simple", width=512, layers=1, dropout=0.1), learning_rate=0.001)


def transformer() -> CharRNNConfig:
    """Three blocks of a Transformer, on chunks of 256 characters."""
    config = _config(RNNConfig(name="transformer", width=192, layers=3, dropout=0.1), learning_rate=0.003)
    return dataclasses.replace(config, batch_size=16, sequence_length=256)


def _config(model: RNNConfig, learning_rate: float) -> CharRNNConfig:
    return CharRNNConfig(
        num_epochs=8,
        batch_size=32,
        dataset=DatasetConfig(name="tiny_shakespeare|pydoc"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            weight_decay=0.01,
            schedule="cosine",
            warmup=0.05,
            clip_norm=1.0,
        ),
        model=model,
    )


def prepare(config: CharRNNConfig, dataset: Dataset) -> Dataset:
    """Cuts the text into streams."""
    eval_batch_size = config.examples_at_once
    return text.streams(dataset, config.batch_size, config.sequence_length, eval_batch_size)


def make_task(config: CharRNNConfig, dataset: Dataset) -> LanguageModel:
    """Builds the language-model task of the config's network.

    Raises:
      UserError: fields of the network contradict each other, or the mesh shards the time axis, but the network is not
        parallel over time or the sequence length does not divide.
    """
    model, length = config.model, config.sequence_length
    text_networks.check(config.mesh, model, length, f"--config.sequence_length={length}")

    def create(model: RNNConfig, rngs: nnx.Rngs) -> nnx.Module:
        return text_networks.create(model, len(dataset.label_names), rngs)

    carry = functools.partial(text_networks.initial_carry, model)
    generation_carry = functools.partial(text_networks.generation_carry, model, length)
    context = text_networks.context(model, length)
    return LanguageModel(Network(create, model), carry, length, dataset.tokenizer, generation_carry, context)


def sample(predict: Predictor, config: CharRNNConfig, dataset: Dataset, options: SampleOptions, _: Path) -> None:
    """Prints texts that continue a prompt.

    Raises:
      UserError: the prompt cannot be encoded, or is longer than the network's context.
    """
    assert dataset.tokenizer is not None, "`text.streams` sets it"
    prompt = dataset.tokenizer.encode(options.prompt)
    limit = text_networks.context(config.model, config.sequence_length)
    if limit and len(prompt) > limit:
        raise UserError(f"--prompt has {len(prompt):,} tokens, the network's context {limit:,}: shorten the prompt")
    context = min(config.sequence_length, len(prompt) + options.length)

    def texts(model: nnx.Module, batch: Batch, key: jax.Array) -> jax.Array:
        carry = text_networks.generation_carry(config.model, context, len(batch["prompt"]))
        kwargs = {"length": options.length, "temperature": options.temperature, "top_p": options.top_p}
        return generate(model, batch["prompt"], carry, key, **kwargs)

    tokens = predict(texts, {"prompt": np.tile(prompt, (options.num_samples, 1))}, seed=options.sample_seed)
    for number, row in enumerate(tokens):
        print(f"--- sample {number + 1} of {len(tokens)}")
        print(dataset.tokenizer.decode(np.concatenate([prompt, row])))


EXPERIMENT = app.Experiment(
    "char_rnn",
    str(__doc__),
    {"default": get_config, "lru": lru, "lstm": lstm, "gru": gru, "simple": simple, "transformer": transformer},
    make_task,
    prepare=prepare,
    sample=sample,
    sample_options=SampleOptions,
)

if __name__ == "__main__":
    app.main(EXPERIMENT)
