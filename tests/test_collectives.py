"""The compiled train step has exactly the collectives that its mesh needs."""

import collections
import functools
import math
import re

import jax
import numpy as np
import pytest
from test_steps import Run, _config

from research import sharding
from research.config import CNNConfig, MeshConfig

MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "model": MeshConfig(data=1, model=8),
    "one": MeshConfig(),
}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


@functools.cache
def _compiled(name, microbatch_size=0):
    """Returns the state and the step's collectives: (kind, sizes of its results, number of enclosing loops)."""
    config = _config(mesh=MESHES[name], model=CNNConfig(width=16), microbatch_size=microbatch_size)
    devices = 1 if name == "one" else 8
    run = Run(config, devices)
    with jax.set_mesh(sharding.make_mesh(config, jax.devices()[:devices])):  # as training does
        lowered = run.train.lower(run.state, run.batches.data, run.batches.example(), np.int32(1), run.hparams)
    found = re.findall(rf' = (.*?) ({KINDS})(?:-start)?\(.*?op_name="(.*?)"', lowered.compile().as_text())
    return run.state, [
        (
            kind,
            [math.prod(map(int, filter(None, sizes.split(",")))) for sizes in re.findall(r"f32\[([\d,]*)\]", shapes)],
            name.count("while/body"),
        )
        for shapes, kind, name in found
    ]


def _kinds(name):
    return collections.Counter(kind for kind, *_ in _compiled(name)[1])


def test_one_device_has_no_collectives():
    assert not _kinds("one")


@pytest.mark.parametrize("microbatch_size", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_data_parallelism_is_one_all_reduce_per_step(microbatch_size):
    state, found = _compiled("data", microbatch_size)
    ((kind, sizes, loops),) = found
    assert kind == "all-reduce"
    metrics = 3  # loss, accuracy, the squared norm of a device's gradient
    assert sizes == [sum(x.size for x in jax.tree.leaves(state.params)) + metrics]
    assert loops == 1  # over steps, not over microbatches


def test_evaluation_has_one_all_reduce_per_dispatch():
    run = Run(_config(model=CNNConfig(width=16)), devices=8)
    arrays = run.state.eval_params, run.state.eval_model_state, {}, run.evals.data, next(iter(run.evals))
    text = run.eval.lower(*arrays).compile().as_text()
    ((shape, name),) = re.findall(rf' = (.*?) (?:{KINDS})(?:-start)?\(.*?op_name="(.*?)"', text)
    batches = len(arrays[-1].mask)
    values = 3 + 15  # loss, accuracy, weight, and the bins of the calibration
    assert re.findall(r"\[([\d,]+)\]", shape) == [str(values * batches)]
    assert "while/body" not in name


@pytest.mark.slow
def test_reduce_dtype_is_the_dtype_of_the_all_reduce():
    mesh = MeshConfig(reduce_dtype="bfloat16")
    run = Run(_config(mesh=mesh, model=CNNConfig(width=16)), devices=8)
    lowered = run.train.lower(run.state, run.batches.data, run.batches.example(), np.int32(1), run.hparams)
    count = sum(x.size for x in jax.tree.leaves(run.state.params))
    reduced = re.findall(r"stablehlo.all_reduce.*?\(tensor<(.*?)>\)", lowered.as_text(), re.DOTALL)
    assert sorted(reduced) == sorted([f"{count}xbf16", "3xf32"])
    whole, rounded = Run(_config(model=CNNConfig(width=16)), devices=8).steps(5), run.steps(5)
    np.testing.assert_allclose(rounded, whole, rtol=2e-2)
    assert not np.array_equal(rounded, whole)


def test_fsdp_gathers_each_sharded_parameter_once_and_reduces_the_gradients_once():
    state, found = _compiled("fsdp")
    assert _kinds("fsdp") == {"all-gather": 9, "all-reduce": 2}  # XLA:CPU has no reduce-scatter
    split = [x.size for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    gathered = [size for kind, sizes, _ in found if kind == "all-gather" for size in sizes]
    assert sorted(gathered) == sorted(split)
    first, second = ([size for size in sizes if size > 1] for kind, sizes, _ in found if kind == "all-reduce")
    assert sorted(first) == sorted(x.size for x in jax.tree.leaves(state.params))
    assert not second  # scalars: each device's part of the gradient norm


@pytest.mark.slow
def test_tensor_parallelism_gathers_and_reduces_activations():
    assert set(_kinds("model")) == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_fsdp_leaves_each_device_an_eighth_of_the_sharded_arrays(part):
    whole, split = (getattr(_compiled(name)[0], part) for name in ("data", "fsdp"))
    cannot = sum(x.nbytes for x in jax.tree.leaves(split) if x.sharding.is_fully_replicated)
    total = sum(x.nbytes for x in jax.tree.leaves(whole))
    assert sharding.bytes_per_device(whole) == total
    assert sharding.bytes_per_device(split) == (total - cannot) / 8 + cannot
    assert cannot < total / 100
