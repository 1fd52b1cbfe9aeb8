"""Language modeling: predicting the next token of a text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.data.batch import Batch
from research.data.sources import Dataset
from research.data.tokenization import Bytes, Tokenizer
from research.tasks import token_loss
from research.tasks.task import ExportedFunction, Inputs, Metrics, Task


@dataclasses.dataclass(frozen=True)
class LanguageModel(Task):
    """Predicts the next token from the preceding ones of its stream, by softmax cross-entropy.

    Training is truncated backpropagation through time (Williams & Peng 1990): the recurrent state is carried from batch
    to batch, the gradient is not.

    Attributes:
      network: builds the network from its rngs; `network(tokens, carry, first, train=..., key=...)` returns logits
        [b, T, tokens] and the carry.
      carry: returns the network's initial state for a batch size.
      length: the tokens of an example, T.
      tokenizer: of the text; None: tokens are bytes.
      generation_carry: returns the initial state of a text that is generated token by token; None: `carry`.
      context: how many tokens a generated one depends on; None: no such limit.
    """

    per_device_gradients: ClassVar[bool] = True

    network: Callable[[nnx.Rngs], nnx.Module]
    carry: Callable[[int], Any]
    length: int
    tokenizer: Tokenizer | None = None
    generation_carry: Callable[[int], Any] | None = None
    context: int | None = None
    parallel_over_time = True  # with a parallel cell; `experiments.char_rnn` rejects the others

    @property
    def unit(self) -> tuple[str, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Characters if tokens are bytes, or else tokens, and their number in an example."""
        return "characters" if self._has_bytes else "tokens", self.length

    @property
    def _has_bytes(self) -> bool:
        return self.tokenizer is None or self.tokenizer.kind == Bytes.kind

    def initial_carry(self, batch_size: int) -> Any:
        """The network's initial state."""
        return self.carry(batch_size)

    def advance(
        self, model: nnx.Module, batch: Batch, carry: Any, *, key: jax.Array, train: bool
    ) -> tuple[Metrics, Any]:
        """Computes cross-entropy in nats, accuracy and the bytes of a token, means over the tokens that count.

        Args:
          model: the network.
          batch: as `text.streams` makes it: "tokens" uint [b, T + 1], "first" bool [b], "count" int32 [b].
          carry: the state after the previous batch.
          key: for dropout.
          train: whether this is training.
        """
        tokens = batch["tokens"].astype(jnp.int32)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        arguments = inputs, carry, batch["first"]
        loss, correct, carry = token_loss.losses(model, targets, *arguments, train=train, key=key)
        count = batch["count"][:, None]
        weights = (jnp.arange(targets.shape[1]) < count) / jnp.maximum(count, 1)
        values = {"loss": loss, "accuracy": correct}
        if self.tokenizer and not self._has_bytes and self.tokenizer.num_bytes is not None:
            values["bytes_per_token"] = jnp.asarray(self.tokenizer.num_bytes)[targets]
        return {name: (weights * value).sum(1) for name, value in values.items()}, carry

    def example_weights(self, batch: Batch) -> jax.Array:
        """Returns the number of tokens that count, float32 [b]."""
        return batch["count"].astype(jnp.float32)

    def summarize(self, means: Mapping[str, Any]) -> dict[str, float]:
        """Adds perplexity (exp loss) and, if the bytes of tokens are known, bits per byte (loss / log 2 / bytes)."""
        metrics = super().summarize(means)
        metrics["perplexity"] = float(np.exp(metrics["loss"]))
        if self._has_bytes or "bytes_per_token" in metrics:
            bits = metrics["loss"] / np.log(2) / metrics.get("bytes_per_token", 1.0)
            metrics["bits_per_byte"] = float(bits)
        return metrics

    def functions(self, model: nnx.Module, dataset: Dataset) -> dict[str, ExportedFunction]:
        """Exports `step`, one token of a sequence.

        Inputs are "token" int32 [b] and the state, "carry.<i>" [b, ...] each (initially zeros): float32 [b, units] of
        a recurrent network; the number of tokens, keys and values of a Transformer (`transformer.Cache`). Outputs are
        "logits" float32 [b, tokens] of the next token, and the state under the same names.
        """
        del model, dataset
        leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: (self.generation_carry or self.carry)(1)))
        names = [f"carry.{i}" for i in range(len(leaves))]

        def step(model: Any, inputs: Inputs) -> dict[str, jax.Array]:
            carry = jax.tree.unflatten(structure, [inputs[name] for name in names])
            token = inputs["token"][:, None]
            logits, carry = model(token, carry, jnp.zeros(token.shape[0], bool), train=False)
            return {"logits": logits[:, 0]} | dict(zip(names, jax.tree.leaves(carry)))

        shapes = [", ".join(("b", *map(str, leaf.shape[1:]))) for leaf in leaves]
        state = {name: (shape, str(leaf.dtype)) for name, shape, leaf in zip(names, shapes, leaves)}
        inputs = {"token": ("b", "int32"), **state}
        return {"step": ExportedFunction(step, inputs, "a token is the number of its class", self.context)}
