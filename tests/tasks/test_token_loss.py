"""The loss in chunks is that of all logits at once, with its gradient, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch.plans import hlo
from research import sharding
from research.config import Config, MeshConfig
from research.tasks import token_loss

B, T, WIDTH, VOCABULARY = 4, 7, 6, 50
RNG = np.random.default_rng(0)
FEATURES, KERNEL = RNG.standard_normal((B, T, WIDTH)), RNG.standard_normal((WIDTH, VOCABULARY))
TARGETS = RNG.integers(0, VOCABULARY, (B, T), dtype=np.int32)
WEIGHTS = RNG.random((B, T))


class Network(nnx.Module):
    """Its logits are a product of its input; the carry counts calls."""

    def __init__(self, kernel=KERNEL, dtype=jnp.float32):
        self.kernel, self.sizes = nnx.Param(jnp.asarray(kernel, dtype)), []

    def __call__(self, x, carry, *, train):
        x, carry = self.token_features(x, carry, train=train)
        return self.logits(x), carry

    def token_features(self, x, carry, *, train):
        assert train
        return x, carry + 1

    def logits(self, features):
        return features @ self.kernel[...]


class Doubled(Network):
    """Overrides the call, which must then be what counts."""

    def __call__(self, x, carry, *, train):
        logits, carry = super().__call__(x, carry, train=train)
        return 2 * logits, carry


def _reference(scale=1.0):
    """Returns losses, hits, and the gradients of the weighted loss, in float64."""
    logits = scale * FEATURES @ KERNEL
    log_sums = np.log(np.exp(logits).sum(-1))
    loss = log_sums - np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    d_logits = np.exp(logits - log_sums[..., None]) - np.eye(VOCABULARY)[TARGETS]
    d_logits = scale * d_logits * WEIGHTS[..., None]
    gradients = d_logits @ KERNEL.T, np.einsum("btw,btv->wv", FEATURES, d_logits)
    return loss, logits.argmax(-1) == TARGETS, gradients


def _weighted(features, kernel, network):
    model = network(kernel, kernel.dtype)
    loss, hits, carry = token_loss.losses(model, jnp.asarray(TARGETS), features, 3, train=True)
    return (loss * jnp.asarray(WEIGHTS, loss.dtype)).sum(), (loss, hits, carry)


@pytest.mark.parametrize("network", [Network, Doubled])
@pytest.mark.parametrize(("limit", "chunks"), [(10**9, 1), (B * VOCABULARY * 3, 3), (1, 7)])
def test_values_and_gradients_are_those_of_all_logits(monkeypatch, limit, chunks, network):
    monkeypatch.setattr(token_loss, "MAX_LOGITS", limit)
    with jax.enable_x64(True):
        arrays = jnp.asarray(FEATURES), jnp.asarray(KERNEL)
        assert token_loss._num_chunks(Network(dtype=jnp.float64).logits, arrays[0]) == chunks
        gradient = jax.value_and_grad(_weighted, (0, 1), has_aux=True)
        (_, (loss, hits, carry)), gradients = jax.jit(gradient, static_argnums=2)(*arrays, network)
    expected, expected_hits, expected_gradients = _reference(2.0 if network is Doubled else 1.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # of float32 accuracies
    np.testing.assert_array_equal(hits, expected_hits)
    assert int(carry) == 4
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_devices_that_share_the_model_are_not_counted(monkeypatch):
    monkeypatch.setattr(token_loss, "MAX_LOGITS", B * VOCABULARY)
    network, features = Network(), jnp.zeros((B, T, WIDTH))
    for shape, chunks in (((1, 1), 7), ((2, 1), 4), ((1, 2), 7)):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(shape, ("data", "model"))):
            assert token_loss._num_chunks(network.logits, features) == chunks


class InBfloat16(Network):
    """Its product is in bfloat16, as a network's with that dtype."""

    def __call__(self, x, carry, *, train):
        return super().__call__(x, carry, train=train)

    def token_features(self, x, carry, *, train):
        return super().token_features(x, carry, train=train)

    def logits(self, features):
        return (features.astype("bfloat16") @ self.kernel[...].astype("bfloat16")).astype("float32")


@pytest.mark.parametrize("axes", [(1, 8, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2)])
def test_devices_sum_the_gradient_of_the_kernel_once_after_all_chunks(monkeypatch, axes):
    """GSPMD sums the gradient of a product in every iteration of a loop."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((8, 96, WIDTH), np.float32)
    targets = rng.integers(0, VOCABULARY, (8, 96), dtype=np.int32)
    kernel = np.asarray(KERNEL, np.float32)

    def loss(features, kernel, targets, network):
        return token_loss.losses(network(kernel), targets, features, 0, train=True)[0].sum()

    gradient = jax.jit(jax.grad(loss, 1), static_argnums=3)
    expected = gradient(features, kernel, targets, Network)
    devices = axes[0] * axes[1] * axes[2]
    monkeypatch.setattr(token_loss, "MAX_LOGITS", 8 * 96 * VOCABULARY // devices // 4)
    mesh = sharding.make_mesh(Config(batch_size=8, mesh=MeshConfig(*axes)))
    with jax.set_mesh(mesh):
        assert token_loss._num_chunks(Network().logits, jnp.asarray(features)) == 4
        batch = NamedSharding(mesh, P(sharding.BATCH_AXES, sharding.SEQUENCE))
        arrays = jax.device_put((features, kernel, targets), (batch, NamedSharding(mesh, P()), batch))
        compiled = gradient.lower(*arrays, InBfloat16).compile()
    summed = [one for one in hlo.Program(compiled.as_text()).collectives() if one.kind == "all-reduce"]
    large = [one.count for one in summed if one.bytes >= kernel.nbytes // 2 // axes[3]]
    assert large == [1] * (1 + (axes[2] > 1)), summed  # XLA:CPU sums over the batch and over time one after the other
    np.testing.assert_allclose(compiled(*arrays), expected, atol=0.02 * np.abs(expected).max())


def test_each_device_sums_the_gradients_of_its_chunks_in_float32(monkeypatch):
    """The gradients are equal. In bfloat16, their sum would stop growing at 256 times one of them."""
    length = 1024
    targets = jnp.zeros((8, length), jnp.int32)
    monkeypatch.setattr(token_loss, "MAX_LOGITS", 1)
    mesh = sharding.make_mesh(Config(batch_size=8, mesh=MeshConfig(data=1, fsdp=8)))

    def loss(kernel):
        return token_loss.losses(InBfloat16(kernel), targets, jnp.ones((8, length, WIDTH)), 0, train=True)[0].sum()

    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss))(jnp.zeros((WIDTH, VOCABULARY)))
    expected = 8 * length * (1 / VOCABULARY - np.eye(VOCABULARY)[0])
    np.testing.assert_allclose(found, np.tile(expected, (WIDTH, 1)), rtol=0.01)


def test_a_batch_that_the_mesh_does_not_divide(monkeypatch):
    monkeypatch.setattr(token_loss, "MAX_LOGITS", 2 * VOCABULARY)
    features, targets = np.asarray(FEATURES[:3], np.float32), TARGETS[:3]
    mesh = sharding.make_mesh(Config(batch_size=8, mesh=MeshConfig(data=1, fsdp=8)))
    with jax.set_mesh(mesh):
        loss, hits, _ = jax.jit(lambda *x: token_loss.losses(Network(), x[1], x[0], 0, train=True))(features, targets)
    expected, expected_hits, _ = _reference()
    np.testing.assert_allclose(loss, expected[:3], rtol=1e-5)
    np.testing.assert_array_equal(hits, expected_hits[:3])


# 96 steps of 8 devices can be divided into chunks without padding, 13 and 31 steps of each cannot.
@pytest.mark.parametrize("length", [96, 8 * 13, 8 * 31])
def test_no_device_gathers_the_features_of_a_sharded_time_axis(monkeypatch, length):
    """Every device computes only the logits of its own time steps, give or take those next to them."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, length, WIDTH), np.float32)
    targets = rng.integers(0, VOCABULARY, (1, length), dtype=np.int32)

    def loss(features, kernel, targets):
        return token_loss.losses(Network(kernel), targets, features, 0, train=True)[0].sum()

    gradient = jax.value_and_grad(loss, (0, 1))
    kernel = np.asarray(KERNEL, np.float32)
    expected = jax.jit(gradient)(features, kernel, targets)
    monkeypatch.setattr(token_loss, "MAX_LOGITS", length * VOCABULARY // 8 // 3)
    mesh = sharding.make_mesh(Config(batch_size=4, mesh=MeshConfig(data=1, sequence=8)))
    with jax.set_mesh(mesh):
        assert token_loss._num_chunks(Network().logits, jnp.asarray(features)) in (3, 4)
        over_time, everywhere = (NamedSharding(mesh, spec) for spec in (P(None, sharding.SEQUENCE), P()))
        arrays = jax.device_put((features, kernel, targets), (over_time, everywhere, over_time))
        compiled = jax.jit(gradient).lower(*arrays).compile()
    found = hlo.Program(compiled.as_text()).collectives()
    assert {one.kind for one in found} <= {"all-reduce", "collective-permute"}
    assert all(one.bytes <= features.nbytes / 6 for one in found if one.kind == "collective-permute"), found
    for ours, theirs in zip(jax.tree.leaves(compiled(*arrays)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_chunks_lower_the_peak_memory(monkeypatch):
    tokens, vocabulary = 1024, 4096
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, tokens, 32), (32, vocabulary)))

    def loss(features, kernel):
        targets = jnp.zeros((1, tokens), jnp.int32)
        return token_loss.losses(Network(kernel), targets, features, 0, train=True)[0].sum()

    shapes, sizes = list(shapes), {}
    for limit in (tokens * vocabulary, tokens * vocabulary // 16):
        monkeypatch.setattr(token_loss, "MAX_LOGITS", limit)
        jax.clear_caches()
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        sizes[limit] = compiled.memory_analysis().temp_size_in_bytes
    whole, chunked = sizes.values()
    assert whole > 4 * tokens * vocabulary
    assert chunked < whole / 5, sizes
