"""The recurrences and their gradients equal those of the cells' equations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from research import sharding
from research.config import Config, MeshConfig
from research.layers import recurrence

CELLS = {"simple": (recurrence.simple, 1, 1), "gru": (recurrence.gru, 3, 1), "lstm": (recurrence.lstm, 4, 2)}
LENGTH, BATCH, UNITS = 5, 8, 4


def _arguments(name, dtype=np.float32):
    _, gates, memories = CELLS[name]
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    x = draw(LENGTH, BATCH, gates * UNITS)
    state = tuple(draw(BATCH, UNITS, scale=0.5) for _ in range(memories))
    return x, state, draw(UNITS, gates * UNITS, scale=0.5), draw(gates * UNITS, scale=0.5)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _equations(name, x, state, kernel, bias, np=np, sigmoid=_sigmoid):
    """Computes one step gate by gate, as in textbooks; returns the new state."""
    gates, matrices, biases = (np.split(part, CELLS[name][1], axis=-1) for part in (x, kernel, bias))
    h = state[0]
    products = [h @ matrix + b for matrix, b in zip(matrices, biases)]
    sums = [g + p for g, p in zip(gates, products)]
    if name == "simple":
        return (np.tanh(sums[0]),)
    if name == "gru":
        r, z = sigmoid(sums[0]), sigmoid(sums[1])
        n = np.tanh(gates[2] + r * products[2])
        return ((1 - z) * n + z * h,)
    c = sigmoid(sums[1]) * state[1] + sigmoid(sums[0]) * np.tanh(sums[2])
    return sigmoid(sums[3]) * np.tanh(c), c


def _plain(name, x, state, kernel, bias):
    """Runs the equations in a loop that JAX differentiates itself."""

    def body(state, x_t):
        state = _equations(name, x_t, state, kernel, bias, jnp, jax.nn.sigmoid)
        return state, state[0]

    return jax.lax.scan(body, state, x)[::-1]


def _loss(outputs_and_state):
    """Sums all outputs and the final state, each with a different weight."""
    leaves = jax.tree.leaves(outputs_and_state)
    return sum((jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape) * leaf).sum() for leaf in leaves)


def _gradients(function, arguments):
    """Returns the loss and its gradients with respect to all arguments."""
    gradient = jax.value_and_grad(lambda *arguments: _loss(function(*arguments)), argnums=(0, 1, 2, 3))
    return jax.jit(gradient)(*arguments)


def _agree(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(np.abs(other).max()) or 1.0
        np.testing.assert_allclose(np.float64(one) / scale, np.float64(other) / scale, atol=tolerance)


@pytest.mark.parametrize("name", CELLS)
def test_outputs_equal_the_equations_in_float64(name):
    with jax.enable_x64(True):
        arguments = _arguments(name, np.float64)
        x, state, *weights = arguments
        outputs = []
        for x_t in x:
            state = _equations(name, x_t, state, *weights)
            outputs.append(state[0])
        _agree(jax.jit(CELLS[name][0])(*arguments), (np.stack(outputs), state), 1e-12)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_equal_those_of_plain_differentiation(name):
    arguments = _arguments(name)
    _agree(
        _gradients(CELLS[name][0], arguments), _gradients(lambda *arguments: _plain(name, *arguments), arguments), 1e-5
    )


def test_unrolling_as_on_a_gpu_changes_nothing(monkeypatch):
    """Five steps, unrolled by two: one remains."""
    arguments = _arguments("lstm")
    by_ones = _gradients(recurrence.lstm, arguments)
    monkeypatch.setattr(recurrence, "_UNROLL", {"cpu": 2})
    assert "unroll=2" in str(jax.make_jaxpr(recurrence.lstm)(*arguments))
    _agree(_gradients(lambda *arguments: recurrence.lstm(*arguments), arguments), by_ones, 1e-6)


@pytest.mark.parametrize(("platform", "turns"), [("cuda", 5), ("rocm", 5), ("cpu", 40), ("tpu", 40)])
def test_a_program_for_a_gpu_is_unrolled_by_eight_on_any_host(platform, turns):
    x, *others = _arguments("lstm")
    arguments = (np.concatenate([x] * 8), *others)
    text = jax.jit(recurrence.lstm).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert {turns} == {5, 40} & {int(value) for value in re.findall(r"dense<(\d+)> : tensor<i32>", text)}


@pytest.mark.parametrize("name", CELLS)
def test_gradients_agree_with_central_differences(name):
    """Along one random direction in the space of all arguments."""
    with jax.enable_x64(True):
        arguments, step = _arguments(name, np.float64), 1e-6
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), arguments)
        loss = jax.jit(lambda arguments: _loss(CELLS[name][0](*arguments)))
        above = loss(jax.tree.map(lambda x, d: x + step * d, arguments, direction))
        below = loss(jax.tree.map(lambda x, d: x - step * d, arguments, direction))
        _, gradients = _gradients(CELLS[name][0], arguments)
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction)))
        np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-7)


def _products_in_loops(jaxpr, inside=False):
    """Returns the shape of each matrix product in the body of a loop."""
    for equation in jaxpr.eqns:
        if inside and equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from _products_in_loops(inner, inside or equation.primitive.name == "scan")


@pytest.mark.parametrize("name", CELLS)
def test_the_kernels_gradient_is_computed_outside_the_loop(name):
    """No loop's body has a product of the kernel's shape, which is what makes the gradient fast."""
    function, gates, _ = CELLS[name]
    arguments = _arguments(name)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *arguments: _loss(function(*arguments)), argnums=2))(*arguments)
    shapes = list(_products_in_loops(jaxpr.jaxpr))
    platforms = len(recurrence._UNROLL) + 1  # each has its own loops; one set is for all other platforms
    assert sorted(shapes) == sorted(platforms * [(BATCH, gates * UNITS), (BATCH, UNITS)])


@pytest.mark.parametrize("name", CELLS)
def test_bfloat16_products_keep_the_state_in_float32(name):
    x, state, kernel, bias = _arguments(name)
    arguments = (jnp.asarray(x, jnp.bfloat16), state, jnp.asarray(kernel, jnp.bfloat16), bias)
    outputs = jax.jit(CELLS[name][0])(*arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.float32)}
    _agree(outputs, _plain(name, *jax.tree.map(lambda x: np.asarray(x, np.float32), arguments)), 3e-2)
    gradient = jax.grad(lambda *arguments: _loss(CELLS[name][0](*arguments)), argnums=(0, 1, 2, 3))
    gradients = jax.eval_shape(gradient, *arguments)
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: jnp.asarray(x).dtype, arguments)


def test_vmap_is_a_loop_over_networks():
    name = "gru"  # all cells share the code that vmap transforms
    gradients = jax.value_and_grad(lambda *arguments: _loss(CELLS[name][0](*arguments)), argnums=(0, 1, 2, 3))
    pairs = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), _arguments(name))
    ours = jax.jit(jax.vmap(gradients))(*pairs)
    _agree(ours, jax.jit(lambda pairs: jax.lax.map(lambda one: gradients(*one), pairs))(pairs), 1e-5)


@pytest.mark.parametrize("name", CELLS)
def test_eight_devices_agree_with_one(name):
    mesh = sharding.make_mesh(Config(batch_size=8, mesh=MeshConfig(data=2, fsdp=2, model=2)))
    x, state, kernel, bias = _arguments(name)
    over = sharding.batch_sharding(mesh, 0)
    placed = (
        jax.device_put(x, sharding.batch_sharding(mesh, 1)),
        jax.device_put(state, over),
        *(
            jax.device_put(p, jax.sharding.NamedSharding(mesh, P(*[None] * (p.ndim - 1), "model")))
            for p in (kernel, bias)
        ),
    )
    _agree(_gradients(CELLS[name][0], placed), _gradients(CELLS[name][0], (x, state, kernel, bias)), 1e-5)
