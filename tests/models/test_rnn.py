"""The recurrent networks equal their equations, carry their state, and every field of their config has its effect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from text_network import NUM_TOKENS, apply, draw_tokens, filled

from research import sharding
from research.config import Config, MeshConfig, RNNConfig
from research.models import rnn

CELLS = ("simple", "gru", "lstm", "mingru", "lru")


def _memory(config, batch_size=4):
    """Returns a random carry."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), rnn.initial_carry(config, batch_size)
    )


def _close(ours, theirs, tolerance=1e-5):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=tolerance), ours, theirs)


def _layer_params(name: str, w: int) -> int:
    return {
        "simple": w * w + w * w + w,
        "gru": 3 * (w * w + w * w + 2 * w),  # two biases, as in torch.nn.GRU
        "lstm": 4 * (w * w + w * w + w),  # as in Keras's LSTM
        "mingru": 2 * w + (2 * w * w + 2 * w) + w * w + (4 * w * w + 4 * w) + (4 * w * w + w),
        # A norm, lambda and gamma, B and C (complex), D, and the gated unit.
        "lru": w + 3 * w + 2 * w * w + 2 * w * w + w + (2 * w * w + 2 * w),
    }[name]


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts(name, tied):
    config = RNNConfig(name=name, width=24, layers=3, tied=tied)
    model = nnx.eval_shape(lambda: rnn.RNN(config, NUM_TOKENS, nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    outside = NUM_TOKENS * 24 * (1 if tied else 2) + NUM_TOKENS + (24 if name in rnn.PARALLEL else 0)
    assert count == 3 * _layer_params(name, 24) + outside


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("simple", "gru") else []) for name in CELLS]
)
def test_the_carry_continues_a_text_that_was_cut(name):
    """Reads a text at once, and in three pieces, one of them a single character."""
    config = RNNConfig(name=name, width=8)
    model, tokens, carry = filled(config), draw_tokens(8, batch_size=4), _memory(config)
    whole, last = apply(model, tokens, carry)
    pieces = []
    for piece in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        logits, carry = apply(model, piece, carry)
        pieces.append(logits)
    _close((jnp.concatenate(pieces, 1), carry), (whole, last))


@pytest.mark.parametrize("name", CELLS)
def test_first_resets_single_rows_and_the_future_is_not_seen(name):
    config = RNNConfig(name=name, width=8, layers=1)
    model, tokens, carry = filled(config), draw_tokens(6, batch_size=4), _memory(config)
    first = np.array([True, False, True, False])
    reset, _ = apply(model, tokens, carry, first)
    fresh, _ = apply(model, tokens, rnn.initial_carry(config, 4))
    kept, _ = apply(model, tokens, carry)
    _close(reset[first], fresh[first])
    _close(reset[~first], kept[~first])
    assert np.abs(fresh - kept).max(axis=(1, 2)).min() > 1e-3
    other = tokens.copy()
    other[:, 3:] = (other[:, 3:] + 1) % NUM_TOKENS
    changed, _ = apply(model, other, carry)
    np.testing.assert_array_equal(changed[:, :3], kept[:, :3])
    assert np.abs(changed[:, 3:] - kept[:, 3:]).max(axis=(0, 2)).min() > 1e-3


def _rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _linear(layer, x):
    y = x @ np.float64(layer.kernel[...])
    return y if layer.bias is None else y + np.float64(layer.bias[...])


def _min_gru(layer, x, h):
    """Computes one step of Feng et al. 2024, section 3.1, followed by the feed-forward layer."""
    normal = _rms_norm(x, layer.norm.scale[...])
    z, candidate = np.split(_linear(layer.inputs, normal), 2, -1)
    h = (1 - _sigmoid(z)) * h + _sigmoid(z) * candidate
    x = x + _linear(layer.outputs, h)
    return x + _linear(layer.contract, _gelu(_linear(layer.expand, _rms_norm(x, layer.mlp_norm.scale[...])))), h


def _lru(layer, x, h):
    """Computes one step of Orvieto et al. 2023, section 3, in complex numbers."""
    w = x.shape[-1]
    eigenvalues = np.exp(-np.exp(layer.nu[...]) + 1j * np.exp(layer.theta[...]))
    b, c = np.float64(layer.inputs.kernel[...]), np.float64(layer.outputs.kernel[...])
    b, c = b[:, :w] + 1j * b[:, w:], c[:w] - 1j * c[w:]
    normal = _rms_norm(x, layer.norm.scale[...])
    h = eigenvalues * (h[:, :w] + 1j * h[:, w:]) + np.exp(layer.gamma[...]) * (normal @ b)
    value, gate = np.split(_linear(layer.gate, _gelu((h @ c).real + layer.skip[...] * normal)), 2, -1)
    return x + value * _sigmoid(gate), np.concatenate([h.real, h.imag], -1)


@pytest.mark.parametrize(("name", "equations"), [("mingru", _min_gru), ("lru", _lru)])
def test_the_parallel_networks_equal_their_equations(name, equations):
    config = RNNConfig(name=name, width=8, layers=2)
    model, tokens = filled(config), draw_tokens(6, batch_size=4)
    logits, last = apply(model, tokens, carry := _memory(config))
    memories = [np.float64(state[0]) for state in carry]
    for t in range(6):
        x = np.float64(model.embedding.embedding[...])[tokens[:, t]]
        for i, layer in enumerate(model.layers):
            x, memories[i] = equations(layer, x, memories[i])
        expected = _rms_norm(x, model.norm.scale[...]) @ np.float64(model.kernel[...]) + model.bias[...]
        np.testing.assert_allclose(logits[:, t], expected, atol=2e-5)
    _close([state[0] for state in last], memories)


@pytest.mark.parametrize("name", ["gru", "mingru", "lru"])
def test_dropout_acts_in_training_only_and_stores_no_random_state(name):
    model, plain = (filled(RNNConfig(name=name, width=8, layers=1, dropout=rate)) for rate in (0.5, 0.0))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    tokens, carry = draw_tokens(3, batch_size=4), rnn.initial_carry(RNNConfig(name=name, width=8, layers=1), 4)
    keys = jax.random.split(jax.random.key(0))
    evaluation = apply(plain, tokens, carry)[0]
    np.testing.assert_array_equal(apply(model, tokens, carry, key=keys[0])[0], evaluation)
    one, other = (apply(model, tokens, carry, train=True, key=key)[0] for key in keys)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - evaluation).max() > 1e-3


@pytest.mark.parametrize("name", ["gru", "mingru", "lru"])
def test_bfloat16_networks_return_float32_logits_and_states(name):
    carry = _memory(config := RNNConfig(name=name, width=8, layers=1))
    full = apply(filled(config), draw_tokens(3, batch_size=4), carry)
    low = apply(filled(dataclasses.replace(config, dtype="bfloat16")), draw_tokens(3, batch_size=4), carry)
    assert {leaf.dtype for leaf in jax.tree.leaves((low, full))} == {jnp.dtype(jnp.float32)}
    assert 1e-4 < np.abs(low[0] - full[0]).max() < 0.3


def _initial(config, vocabulary_size=NUM_TOKENS):
    """Returns the initial parameters."""
    return jax.jit(lambda: nnx.state(rnn.RNN(config, vocabulary_size, nnx.Rngs(0))))()


@pytest.mark.parametrize(
    ("name", "tied", "unit"), [("gru", False, True), ("gru", True, False), ("mingru", False, False)]
)
def test_embeddings_have_the_scale_that_the_next_layer_expects(name, tied, unit):
    embedding = _initial(RNNConfig(name=name, width=16, layers=1, tied=tied), 200)["embedding"]["embedding"][...]
    np.testing.assert_allclose(embedding.std(), 1 if unit else 1 / 4, rtol=0.05)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_sequential_cells_are_initialized_to_remember(name):
    gates = {"gru": 3, "lstm": 4}[name]
    layer = _initial(RNNConfig(name=name, width=8, layers=1))["layers"][0]
    for kernel in np.split(np.asarray(layer["kernel"][...]), gates, axis=1):
        np.testing.assert_allclose(kernel.T @ kernel, np.eye(8), atol=1e-5)
    biases = np.split(np.asarray(layer["bias"][...]), gates)
    assert [set(bias.tolist()) for bias in biases] == [{float(name == "lstm" and i == 1)} for i in range(gates)]


def test_lru_is_initialized_on_its_ring_and_keeps_the_scale_of_its_input():
    layer = _initial(RNNConfig(name="lru", width=128, layers=1))["layers"][0]
    radius, phase = np.exp(-np.exp(layer["nu"][...])), np.exp(layer["theta"][...])
    assert radius.min() > 0.9 - 1e-6
    assert radius.max() < 0.999 + 1e-6
    np.testing.assert_allclose((radius**2).mean(), (0.9**2 + 0.999**2) / 2, atol=0.02)  # uniform on the ring's area
    np.testing.assert_allclose(phase.mean(), np.pi, atol=0.6)
    np.testing.assert_allclose(np.exp(layer["gamma"][...]) ** 2, 1 - radius**2, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param("lstm", {"data": 2, "fsdp": 2, "model": 2}, marks=pytest.mark.slow),
        pytest.param("mingru", {"data": 2, "sequence": 4}, marks=pytest.mark.slow),
        ("lru", {"fsdp": 2, "sequence": 2, "model": 2}),
    ],
)
def test_eight_devices_agree_with_one(name, axes):
    config = RNNConfig(name=name, width=8, layers=1)
    graphdef, state = nnx.split(filled(config))
    tokens, carry, first = jnp.asarray(draw_tokens(8, batch_size=4)), _memory(config), np.array([True, False] * 2)

    def loss(state, mesh, tokens, carry, first):
        state = state if mesh is None else sharding.gather(state, mesh)
        logits, carry = nnx.merge(graphdef, state)(tokens, carry, first, train=False)
        return (logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)).sum(), (logits, carry)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    alone = gradient(state, None, tokens, carry, first)
    mesh = sharding.make_mesh(Config(batch_size=4, mesh=MeshConfig(**axes)))
    with jax.set_mesh(mesh):
        rows = jax.device_put((tokens, carry, first), sharding.batch_sharding(mesh, 0))
        placed = jax.device_put(state, sharding.tree_shardings(state, mesh))
        compiled = gradient.lower(placed, mesh, *rows).compile()
        together = compiled(placed, *rows)
    _close(jax.device_get(together), jax.device_get(alone), 5e-5)
    if name in rnn.PARALLEL:  # each device has only its shard of the time axis
        text = compiled.as_text()
        assert f"f32[{8 // axes['sequence']},2,8]" in text
        assert "f32[8,2,8]" not in text
