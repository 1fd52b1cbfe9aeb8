"""Parameters are gathered in the dtype in which the network uses them, with the same results for any network."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_steps
from jax.sharding import Mesh
from test_steps import Run, _config

from research import sharding
from research.config import CNNConfig, MeshConfig, OptimizerConfig
from research.network import split_frozen
from research.training import gather_dtypes

HALF, WHOLE = jnp.dtype("bfloat16"), jnp.dtype("float32")


def _dense(x, w):
    return jnp.sin(x.astype(HALF) @ w.astype(HALF))


def _scan(x, w):
    return jax.lax.scan(lambda x, _: (_dense(x, w).astype(WHOLE), None), x, length=3)[0]


def _scan_over_layers(x, w):
    layers = w.reshape(2, 4, 8)
    return jax.lax.scan(lambda x, half: (x + (x @ half.T.astype(HALF)) @ half.astype(HALF), None), x, layers)[0]


def _carried(x, w):
    return jax.lax.scan(lambda w, x: (w[::-1], x @ w.astype(HALF)), w, x)[1]


@jax.custom_vjp
def _keeps_whole(x, w):
    return _dense(x, w)


def _keeps_whole_forward(x, w):
    return _keeps_whole(x, w), (x, w)


def _keeps_whole_backward(kept, gradient):
    return gradient.astype(WHOLE) @ kept[1].T, kept[0].T @ gradient.astype(WHOLE)


_keeps_whole.defvjp(_keeps_whole_forward, _keeps_whole_backward)


@pytest.mark.parametrize(
    ("network", "dtype"),
    [
        (_dense, HALF),
        (jax.jit(_dense), HALF),
        (jax.checkpoint(_dense), HALF),
        (lambda x, w: _dense(_dense(x, w), w.T), HALF),
        (lambda x, w: w[jnp.array([0, 3])].astype(HALF), HALF),
        (_scan, HALF),
        (_scan_over_layers, HALF),
        (lambda x, w: x @ w, WHOLE),
        (lambda x, w: _dense(x, w) + w.mean(), WHOLE),
        (lambda x, w: _dense(x, w) + x @ w.astype("float16"), WHOLE),
        (lambda x, w: x @ w.astype("int32"), WHOLE),
        (lambda x, w: _dense(x, 2 * w), WHOLE),
        (_carried, WHOLE),
        (lambda x, w: _keeps_whole(_dense(x, w).astype(WHOLE), w), WHOLE),
    ],
)
def test_it_is_the_narrower_dtype_of_all_uses(network, dtype):
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8, 1, 1), sharding.AXES)
    x, w = jnp.linspace(-1, 1, 64).reshape(8, 8), jnp.linspace(-2, 2, 64).reshape(8, 8)

    def gradient(w, dtypes=None):
        def loss(w):
            return network(x, sharding.gather(w, mesh, dtypes=dtypes)).sum().astype(WHOLE)

        return jax.value_and_grad(loss)(w)

    (found,) = gather_dtypes.used(gradient, w)
    assert found == dtype
    wide, narrow = (jax.jit(functools.partial(gradient, dtypes=dtypes))(w) for dtypes in (None, found))
    assert narrow[1].dtype == WHOLE
    jax.tree.map(np.testing.assert_array_equal, wide, narrow)


def _own(_, *arrays):
    return jax.tree.map(lambda x: x.dtype, arrays)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "freeze"), [("none", "logits"), ("all", "")])
def test_a_step_gathers_in_bfloat16_and_has_the_same_bits(remat, freeze, monkeypatch):
    optimizer = OptimizerConfig(name="momentum", learning_rate=0.05, freeze=freeze)
    model, mesh = CNNConfig(width=16, dtype="bfloat16"), MeshConfig(data=1, fsdp=8)
    config = _config(mesh=mesh, model=model, optimizer=optimizer, remat=remat)
    losses = []
    for dtype, used in (("bf16", gather_dtypes.used), ("f32", _own)):
        monkeypatch.setattr(gather_dtypes, "used", used)
        monkeypatch.setattr(test_steps, "_BUILDS", {})
        run = Run(config, devices=8)
        lowered = run.train.lower(run.state, run.batches.data, run.batches.example(), np.int32(1), run.hparams)
        arrays = run.state.params, split_frozen(run.state.model_state)[0]
        shapes = ["x".join(map(str, x.shape)) for x in jax.tree.leaves(arrays) if not x.sharding.is_fully_replicated]
        gathered = re.findall(r"sharding_constraint .* : tensor<([x\d]+)x(bf16|f32)>", lowered.as_text())
        assert len(shapes) == 9
        assert {(shape, dtype) for shape in shapes} <= set(gathered)
        losses.append(run.steps(5))
    np.testing.assert_array_equal(*losses)
