"""What the compiled train step sends between devices is what its mesh needs, and nothing else."""

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
def _compiled(name):
    """The state, and the compiled step's collectives: (kind, the elements of each of its results)."""
    run = Run(_config(mesh=MESHES[name], model=CNNConfig(width=16)), devices=1 if name == "one" else 8)
    lowered = run.train.lower(run.state, run.batches.data, run.batches.sample(), np.int32(1), run.seed)
    found = re.findall(rf" = (.*?) ({KINDS})(?:-start)?\(", lowered.compile().as_text())
    return run.state, [
        (
            kind,
            [math.prod(map(int, filter(None, sizes.split(",")))) for sizes in re.findall(r"f32\[([\d,]*)\]", shapes)],
        )
        for shapes, kind in found
    ]


def _kinds(name):
    return collections.Counter(kind for kind, _ in _compiled(name)[1])


def test_one_device_sends_nothing():
    assert not _kinds("one")


def test_data_parallelism_is_one_all_reduce_of_the_gradients():
    state, found = _compiled("data")
    ((kind, sizes),) = found
    assert kind == "all-reduce"
    gradients = [x.size for x in jax.tree.leaves(state.params)]
    scalars = len(sizes) - len(gradients)
    assert sorted(sizes) == sorted([*gradients, *[1] * scalars])  # beside them the metrics: loss, accuracy


def test_fsdp_gathers_each_split_parameter_once_and_reduces_the_gradients_once():
    state, found = _compiled("fsdp")
    assert _kinds("fsdp") == {"all-gather": 9, "all-reduce": 2}  # XLA:CPU has no reduce-scatter of its own
    split = [x.size for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    gathered = [size for kind, sizes in found if kind == "all-gather" for size in sizes]
    assert sorted(gathered) == sorted(split)
    first, second = ([size for size in sizes if size > 1] for kind, sizes in found if kind == "all-reduce")
    assert sorted(first) == sorted(x.size for x in jax.tree.leaves(state.params))
    assert not second  # each device's part of the gradient's norm


def test_tensor_parallelism_gathers_and_reduces_activations():
    assert set(_kinds("model")) == {"all-gather", "all-reduce"}


@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_fsdp_leaves_each_device_an_eighth_of_what_can_be_split(part):
    whole, split = (getattr(_compiled(name)[0], part) for name in ("data", "fsdp"))
    cannot = sum(x.nbytes for x in jax.tree.leaves(split) if x.sharding.is_fully_replicated)
    total = sum(x.nbytes for x in jax.tree.leaves(whole))
    assert sharding.bytes_per_device(whole) == total
    assert sharding.bytes_per_device(split) == (total - cannot) / 8 + cannot
    assert cannot < total / 100
