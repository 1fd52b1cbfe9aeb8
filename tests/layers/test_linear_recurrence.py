"""The parallel recurrence equals the sequential one, on one device and with the time axis sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research import sharding
from research.config import Config, MeshConfig
from research.layers import linear_recurrence as layer

CHUNKS = 256  # of a long sequence, in these tests
DTYPES = {"real": np.float32, "complex": np.complex64, "constant": np.complex64}  # constant: a is that of every step


@pytest.fixture(autouse=True)
def _chunks_for_small_arrays(monkeypatch):
    monkeypatch.setattr(layer, "_MAX_SCANNED", CHUNKS * 4 * 5)


def _draw(seed, dtype, *shape):
    rng = np.random.default_rng(seed)
    real, imaginary = rng.uniform(-0.7, 0.7, (2, *shape))
    return (real + 1j * imaginary if dtype == np.complex64 else real).astype(dtype)


def _arguments(kind, length=12):
    dtype = DTYPES[kind]
    a = _draw(0, dtype, *(5,) if kind == "constant" else (length, 4, 5))
    return a, _draw(1, dtype, length, 4, 5), _draw(2, dtype, 4, 5)


def _loop(a, b, h):
    """Computes the recurrence step by step in NumPy, in double precision."""
    hidden = []
    for a_t, b_t in zip(np.broadcast_to(a, b.shape), b):
        h = a_t.astype(np.complex128) * h + b_t
        hidden.append(h)
    return np.stack(hidden)


def _value_and_gradients(function, arguments):
    @jax.jit
    def run(*arguments):
        hidden, vjp = jax.vjp(function, *arguments)
        weights = jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape).astype(hidden.dtype)
        return hidden, *vjp(weights)

    return run(*arguments)


def _agree(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize("length", [12, pytest.param(256, marks=pytest.mark.slow), 257, 2500])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", ["linear_recurrence", "sequential", "parallel"])
def test_every_form_equals_the_loop(kind, form, length):
    a, b, h = _arguments(kind, length)
    np.testing.assert_allclose(jax.jit(getattr(layer, form))(a, b, h), _loop(a, b, h), atol=1e-6)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_gradients_equal_those_of_plain_differentiation(kind, form):
    arguments = _arguments(kind)
    ours = _value_and_gradients(layer.linear_recurrence, arguments)
    _agree(ours, _value_and_gradients(getattr(layer, form), arguments))


@pytest.mark.parametrize("length", [12, 257, 2500])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_backwards_in_time(kind, form, length):
    a, b, h = _arguments(kind, length)
    backwards = jax.jit(getattr(layer, form), static_argnames="reverse")(a, b, h, reverse=True)
    expected = _loop(a if kind == "constant" else a[::-1], b[::-1], h)
    np.testing.assert_allclose(backwards[::-1], expected, atol=1e-6)


def test_accelerators_get_the_parallel_form():
    """The program for a TPU has no loop over time; the one for a CPU has."""
    traced = jax.jit(layer.linear_recurrence).trace(*_arguments("real"))
    assert "stablehlo.while" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("kind", DTYPES)
def test_a_long_sequence_hardly_makes_the_program_larger(kind):
    """The time to compile an associative scan grows with its length, so a long sequence is scanned in chunks."""
    sizes = []
    for length in (2**12, 2**20):
        a, b, h = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _arguments(kind, 1))
        b = jax.ShapeDtypeStruct((length, *b.shape[1:]), b.dtype)
        traced = jax.jit(layer.linear_recurrence).trace(a if kind == "constant" else b, b, h)
        sizes.append(traced.lower(lowering_platforms=("tpu",)).as_text().count("\n"))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)  # the power of a constant takes a few more products


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("length", [1, 2500])
def test_a_program_for_any_batch_size(kind, length):
    """The batch size of an exported program is a symbol. `parallel` has its batch in the second axis."""
    a, b, h = _arguments(kind, length)
    batch = jax.export.symbolic_shape("b")
    b_shape, h_shape = ((*x.shape[:-2], *batch, x.shape[-1]) for x in (b, h))
    shapes = [jax.ShapeDtypeStruct(shape, b.dtype) for shape in (a.shape if a.ndim == 1 else b_shape, b_shape, h_shape)]
    exported = jax.export.export(jax.jit(layer.parallel))(*shapes)
    np.testing.assert_allclose(exported.call(a, b, h), _loop(a, b, h), atol=1e-6)


def test_a_program_for_several_mesh_axes_does_not_ask_for_the_device():
    """libtpu cannot compile that (`axis_index`) if GSPMD shards an axis next to the sequence."""
    mesh = sharding.make_mesh(Config(batch_size=4, mesh=MeshConfig(2, 1, 4, 1)))
    with jax.set_mesh(mesh):
        traced = jax.jit(partial(_value_and_gradients, layer.linear_recurrence)).trace(_arguments("real"))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "sequence" in text
    assert "partition_id" not in text
    assert "axis_index" not in text


def test_a_state_that_underflows_is_forgotten():
    a, b, h = jnp.full((64, 1, 1), 1e-3), jnp.ones((64, 1, 1)), jnp.full((1, 1), 1e30)
    assert float(jax.jit(layer.parallel)(a, b, h)[-1, 0, 0]) == pytest.approx(1 / (1 - 1e-3))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(
    ("axes", "length"),
    [
        pytest.param((2, 1, 2, 2), 6, marks=pytest.mark.slow),
        pytest.param((1, 2, 4, 1), 8, marks=pytest.mark.slow),
        ((2, 1, 4, 1), 7),
        ((2, 1, 4, 1), 1100),
    ],
)
def test_a_time_axis_on_several_devices(monkeypatch, kind, axes, length):
    """4 devices do not divide 7 steps: then every device computes all of them. Of 1,100, each scans 275 in chunks."""
    arguments = _arguments(kind, length)
    alone = _value_and_gradients(layer.linear_recurrence, arguments)
    if length > CHUNKS:
        monkeypatch.setattr(layer, "_on_one_device", layer.parallel)
    mesh = sharding.make_mesh(Config(batch_size=4, mesh=MeshConfig(*axes)))
    time = layer.SEQUENCE if length % axes[2] == 0 else None
    specs = (P(time, sharding.BATCH_AXES), P(time, sharding.BATCH_AXES), P(sharding.BATCH_AXES))
    specs = (P(), *specs[1:]) if kind == "constant" else specs
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs)]
        together = _value_and_gradients(layer.linear_recurrence, placed)
    assert together[0].sharding.spec[:1] == (time,)
    _agree(together, alone)
