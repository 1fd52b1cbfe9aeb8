"""Characters have the distribution of temperature and top_p, and a generated text is the sequence of single steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.config import RNNConfig
from research.models import rnn
from research.tasks.generation import draw, generate

PROMPT = np.array([[1, 2], [3, 3], [0, 6]])
LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], np.float32))


def _expected(temperature, top_p):
    """The nucleus in NumPy: the fewest, most likely characters with total probability top_p, renormalized."""
    probabilities = np.exp(LOGITS / temperature)
    probabilities /= probabilities.sum()
    kept, total = np.zeros(len(LOGITS)), 0.0
    for i in np.argsort(-probabilities):
        if total >= top_p:
            break
        kept[i], total = probabilities[i], total + probabilities[i]
    return kept / total


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.75), (0.5, 0.75), (1.0, 1e-6)])
def test_draws_have_the_nucleus_distribution(temperature, top_p):
    count = 20_000
    logits = jnp.broadcast_to(LOGITS, (count, len(LOGITS)))
    drawn = jax.jit(draw, static_argnums=(2, 3))(logits, jax.random.key(0), temperature, top_p)
    frequencies = np.bincount(drawn, minlength=len(LOGITS)) / count
    expected = _expected(temperature, top_p)
    np.testing.assert_array_equal(frequencies[expected == 0], 0)
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(count))  # five standard deviations


def _network(name):
    config = RNNConfig(name=name, width=8, layers=1)
    model = jax.jit(lambda: nnx.split(rnn.RNN(config, 7, nnx.Rngs(0))))()
    return nnx.merge(*model), rnn.initial_carry(config, 3)


def _generate(name, key, **chosen):
    """Returns a generated text, and the logits of its characters when the whole text is read at once."""
    model, carry = _network(name)

    @jax.jit
    def run(prompt):
        generated = generate(model, prompt, carry, key, **chosen)
        text = jnp.concatenate([prompt, generated], 1)
        logits, _ = model(text, carry, np.zeros(3, bool), train=False)
        return generated, logits[:, prompt.shape[1] - 1 : -1]

    return run(jnp.asarray(PROMPT))


@pytest.mark.parametrize("name", ["lstm", pytest.param("mingru", marks=pytest.mark.slow)])
def test_greedy_text_takes_the_most_likely_character_at_each_step(name):
    generated, logits = _generate(name, jax.random.key(0), length=5, temperature=0.0, top_p=1.0)
    assert generated.dtype == jnp.int32
    np.testing.assert_array_equal(generated, logits.argmax(-1))


def test_drawn_text_is_a_draw_from_each_step():
    key = jax.random.key(5)
    generated, logits = _generate("mingru", key, length=4, temperature=1.5, top_p=0.9)
    for t, step_key in enumerate(jax.random.split(key, 4)):
        np.testing.assert_array_equal(generated[:, t], draw(logits[:, t], step_key, 1.5, 0.9))
