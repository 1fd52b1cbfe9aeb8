"""The Transformer equals its equations in NumPy, at once and token by token, and every field has its effect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from text_network import NUM_TOKENS, apply, draw_tokens, filled

from research.config import MeshConfig, RNNConfig
from research.errors import UserError
from research.models import text_networks, transformer

CONFIG = RNNConfig(name="transformer", width=8, layers=2, heads=2)


def _norm(x, layer):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.float64(layer.scale[...])


def _kernel(layer):
    return np.float64(layer.kernel[...])


def _attention(block, x, heads, scale, window):
    """Attention of one text [T, width], one query at a time, with rotations as complex factors."""
    length, width = x.shape
    size = width // heads

    def rotated(y):
        a, b = np.split(y.reshape(length, heads, size), 2, -1)
        angles = np.arange(length)[:, None, None] / 10_000 ** (np.arange(size // 2) / (size // 2))
        return (a + 1j * b) * np.exp(1j * angles)

    query, key = rotated(x @ _kernel(block.query)), rotated(x @ _kernel(block.key))
    value, y = (x @ _kernel(block.value)).reshape(length, heads, size), np.zeros((length, heads, size))
    for t in range(length):
        seen = slice(max(0, t + 1 - window), t + 1)
        logits = scale * (query[t] * key[seen].conj()).real.sum(-1)
        weights = np.exp(logits) / np.exp(logits).sum(0)
        y[t] = (weights[..., None] * value[seen]).sum(0)
    return y.reshape(length, width) @ _kernel(block.outputs)


def _expected(model, tokens, heads=2, scale=0.5, window=100):
    """The logits of one text [T] in float64, where each token attends to itself and the window - 1 before it."""
    x = np.float64(model.embedding.embedding[...])[tokens]
    for block in model.blocks:
        x = x + _attention(block, _norm(x, block.norm), heads, scale, window)
        y = _norm(x, block.mlp_norm)
        gate = y @ _kernel(block.gate)
        x = x + (gate / (1 + np.exp(-gate)) * (y @ _kernel(block.expand))) @ _kernel(block.contract)
    kernel = model.embedding.embedding[...].T if model.kernel is None else model.kernel[...]
    return _norm(x, model.norm) @ np.float64(kernel)


@pytest.mark.parametrize(
    ("fields", "heads", "scale"),
    [
        ({}, 2, 4**-0.5),
        ({"heads": 0, "tied": True}, 1, 8**-0.5),
        ({"parametrization": "mup", "base_width": 4}, 2, 2**0.5 / 4),  # that of the base width, times 2 / 4
    ],
)
def test_it_equals_its_equations(fields, heads, scale):
    model, tokens = filled(dataclasses.replace(CONFIG, **fields)), draw_tokens()
    logits, carry = apply(model, tokens)
    assert carry == ()
    for row, text in zip(logits, tokens):
        np.testing.assert_allclose(row, _expected(model, text, heads, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 7, [4, 1, 2], [7]], ids=str)
@pytest.mark.parametrize("context", [pytest.param(7, marks=pytest.mark.slow), 3])
def test_with_a_cache_it_attends_to_the_last_tokens_however_the_text_is_cut(context, pieces):
    model, tokens, logits = filled(CONFIG), draw_tokens(), []
    carry = transformer.empty_cache(CONFIG, context, 3)
    for piece in np.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        some, carry = apply(model, piece, carry)
        logits.append(some)
    assert carry.count.tolist() == [7, 7, 7]
    for row, text in zip(np.concatenate(logits, 1), tokens):
        np.testing.assert_allclose(row, _expected(model, text, window=context), rtol=1e-5, atol=1e-5)


def test_first_forgets_the_cache_of_single_rows():
    model, tokens = filled(CONFIG), draw_tokens()
    _, carry = apply(model, tokens, transformer.empty_cache(CONFIG, 4, 3))
    kept, _ = apply(model, tokens, carry)
    reset, _ = apply(model, tokens, carry, [True, False, True])
    fresh, _ = apply(model, tokens, transformer.empty_cache(CONFIG, 4, 3))
    np.testing.assert_allclose(reset[::2], fresh[::2], atol=1e-6)
    np.testing.assert_allclose(reset[1], kept[1], atol=1e-6)
    assert np.abs(kept - fresh)[:, 0].max(-1).min() > 1e-3


def test_the_future_is_not_seen():
    model, tokens = filled(CONFIG), draw_tokens()
    logits, _ = apply(model, tokens)
    tokens[:, 4:] = (tokens[:, 4:] + 1) % NUM_TOKENS
    changed, _ = apply(model, tokens)
    np.testing.assert_array_equal(changed[:, :4], logits[:, :4])
    assert np.abs(changed - logits)[:, 4:].max(axis=(0, 2)).min() > 1e-3


def test_dropout_acts_in_training_only_and_stores_no_random_state():
    model = filled(dataclasses.replace(CONFIG, dropout=0.5))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    keys = jax.random.split(jax.random.key(0))
    evaluation, _ = apply(filled(CONFIG), draw_tokens())
    np.testing.assert_array_equal(apply(model, draw_tokens(), key=keys[0])[0], evaluation)
    one, other = (apply(model, draw_tokens(), train=True, key=key)[0] for key in keys)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - evaluation).max() > 1e-3


def test_bfloat16_returns_float32_logits_and_a_cache_of_half_the_size():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    carry = transformer.empty_cache(low, 4, 3)
    assert {x.dtype for x in jax.tree.leaves(carry.layers)} == {jnp.dtype(jnp.bfloat16)}
    (full, _), (logits, new) = apply(filled(CONFIG), draw_tokens(4)), apply(filled(low), draw_tokens(4), carry)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, carry)
    assert 1e-4 < np.abs(logits - full).max() < 0.3


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts(tied):
    config = RNNConfig(name="transformer", width=24, layers=3, tied=tied)
    model = nnx.eval_shape(lambda: transformer.Transformer(config, NUM_TOKENS, nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == 3 * (4 * 24 * 24 + 3 * 24 * 64 + 2 * 24) + 24 + NUM_TOKENS * 24 * (1 if tied else 2)


def test_initial_kernels_have_their_scales():
    config = dataclasses.replace(CONFIG, width=64, layers=1)
    params = jax.jit(lambda: nnx.state(transformer.Transformer(config, 200, nnx.Rngs(0))))()
    block = params["blocks"][0]
    deviations = {name: float(block[name]["kernel"][...].std()) for name in ("query", "outputs", "expand", "contract")}
    expected = {"query": 64**-0.5, "outputs": (2 * 64) ** -0.5, "expand": 64**-0.5, "contract": (2 * 176) ** -0.5}
    assert deviations == pytest.approx(expected, rel=0.05)
    assert float(params["embedding"]["embedding"][...].std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(params["kernel"][...].std()) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (192, 3), (200, 2), (1024, 16), (254, 1)])
def test_by_default_heads_divide_the_width(width, heads):
    assert transformer.num_heads(RNNConfig(name="transformer", width=width), width) == heads


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "gru", "heads": 2}, "heads=2 is for --config.model.name=transformer: gru has no attention"),
        ({"heads": 3}, "width=8 cannot be split into 3 heads .* use a multiple of 6"),
        ({"heads": 8}, "width=8 cannot be split into 8 heads"),  # of one feature, which nothing can rotate
        ({"width": 7, "heads": 0}, "width=7 cannot be split into 1 heads"),
        ({"parametrization": "mup", "base_width": 6}, "base_width=6 cannot be split into 2 heads"),
    ],
)
def test_contradicting_fields_are_an_error(fields, words):
    with pytest.raises(UserError, match=words):
        text_networks.check(MeshConfig(), dataclasses.replace(CONFIG, **fields), 8, "a text")


def test_a_sharded_time_axis_is_an_error():
    with pytest.raises(UserError, match=r"sequence=2: --config\.model\.name=transformer is not parallel over time"):
        text_networks.check(MeshConfig(sequence=2), CONFIG, 8, "a text")
