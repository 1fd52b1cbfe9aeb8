"""The networks for text, by name: recurrent ones, and the Transformer."""

from typing import Any

from flax import nnx

from research.config import MeshConfig, RNNConfig
from research.errors import UserError
from research.models import rnn, transformer

_TRANSFORMER = "transformer"


def check(mesh: MeshConfig, config: RNNConfig, length: int, what: str) -> None:
    """Raises `UserError` if the fields contradict each other, or the mesh cannot shard the time axis.

    Args:
      mesh: the sizes of the mesh.
      config: the network.
      length: the number of time steps.
      what: has this length, for the message.
    """
    rnn.check_mesh(mesh, config, length, what)
    if config.name == _TRANSFORMER:
        transformer.check(config)
    elif config.heads:
        raise UserError(
            f"--config.model.heads={config.heads} is for --config.model.name={_TRANSFORMER}: {config.name} has no "
            "attention; leave it out"
        )


def create(config: RNNConfig, vocabulary_size: int, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a network with its initial parameters; it is called as `research.models.rnn.RNN` is."""
    network = transformer.Transformer if config.name == _TRANSFORMER else rnn.RNN
    return network(config, vocabulary_size, rngs)


def initial_carry(config: RNNConfig, batch_size: int) -> Any:
    """Returns the state before the first chunk, in training and evaluation: of the Transformer, none."""
    return () if config.name == _TRANSFORMER else rnn.initial_carry(config, batch_size)


def context(config: RNNConfig, length: int) -> int | None:
    """Returns how many tokens a generated one depends on, for examples of `length` tokens; None: no such limit."""
    return length if config.name == _TRANSFORMER else None


def generation_carry(config: RNNConfig, context: int, batch_size: int) -> Any:
    """Returns the state before the first token of a generated text, of which the Transformer's has `context` tokens."""
    if config.name == _TRANSFORMER:
        return transformer.empty_cache(config, context, batch_size)
    return rnn.initial_carry(config, batch_size)
