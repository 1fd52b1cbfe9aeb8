"""The loss is the mean over the characters that count, each predicted from the preceding ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.data.batch import Batch
from research.data.tokenization import Numbers
from research.tasks.language_model import LanguageModel


class Counter(nnx.Module):
    """Predicts from a table by character, plus the number of characters read since `first`."""

    def __init__(self):
        self.table = nnx.Param(jnp.asarray(np.random.default_rng(0).standard_normal((6, 6)), jnp.float32))

    def __call__(self, tokens, carry, first, *, train, key=None):
        carry = jnp.where(first, 0, carry)
        read = carry[:, None] + jnp.arange(1, tokens.shape[1] + 1)
        return self.table[...][tokens] * read[..., None], read[:, -1]


TASK = LanguageModel(lambda _: Counter(), lambda batch_size: jnp.zeros(batch_size, jnp.int32), 4)


def test_loss_accuracy_weight_and_carry():
    tokens = np.random.default_rng(1).integers(0, 6, (3, 5)).astype(np.uint8)
    count, first = np.array([4, 2, 0], np.int32), np.array([True, False, False])
    batch = Batch({"tokens": jnp.asarray(tokens), "count": count, "first": first}, index=np.arange(3))
    carry = TASK.initial_carry(3) + 2
    model = Counter()
    metrics, carry = TASK.advance(model, batch, carry, key=jax.random.key(0), train=False)
    np.testing.assert_array_equal(TASK.example_weights(batch), count)
    np.testing.assert_array_equal(carry, [4, 6, 6])
    for row, begin in [(0, 0), (1, 2)]:
        losses, hits = [], []
        for t in range(count[row]):
            logits = np.asarray(model.table[...])[tokens[row, t]] * (begin + t + 1)
            losses.append(np.log(np.exp(logits).sum()) - logits[tokens[row, t + 1]])
            hits.append(logits.argmax() == tokens[row, t + 1])
        assert float(metrics["loss"][row]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(metrics["accuracy"][row]) == pytest.approx(np.mean(hits))
    assert float(metrics["loss"][2]) == 0.0


def test_figures():
    figures = TASK.summarize({"loss": np.float32(2 * np.log(2)), "accuracy": np.float32(0.5)})
    assert figures == pytest.approx({"loss": 1.386294, "accuracy": 0.5, "bits_per_byte": 2.0, "perplexity": 4.0})
    assert TASK.unit == ("characters", 4)


def test_bits_per_byte_count_the_bytes_of_tokens_that_count():
    tokenizer = Numbers(6)
    numbers = dataclasses.replace(TASK, tokenizer=tokenizer)
    assert numbers.unit == ("tokens", 4)
    assert "bits_per_byte" not in numbers.summarize({"loss": np.float32(1)})
    tokenizer.num_bytes = np.array([1, 2, 0, 5, 3, 1])
    tokens, count = jnp.array([[0, 1, 2, 3, 4], [4, 3, 3, 0, 0]]), jnp.array([4, 2])
    batch = Batch({"tokens": tokens, "count": count, "first": jnp.array([True, True])}, index=np.arange(2))
    carry = jnp.zeros(2, jnp.int32)
    metrics, _ = numbers.advance(Counter(), batch, carry, key=jax.random.key(0), train=False)
    np.testing.assert_allclose(metrics["bytes_per_token"], [(2 + 0 + 5 + 3) / 4, (5 + 5) / 2])
    total = np.asarray(metrics["loss"], np.float64) @ [4, 2]
    means = {name: (value @ count) / 6 for name, value in metrics.items()}
    assert numbers.summarize(means)["bits_per_byte"] == pytest.approx(total / np.log(2) / 20)
