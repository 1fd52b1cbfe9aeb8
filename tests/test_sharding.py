"""The mesh has the shape of the config, and arrays are sharded by the rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import sharding
from research.config import Config, MeshConfig
from research.errors import UserError


@pytest.mark.parametrize(
    ("axes", "count", "expected"),
    [
        ((-1, 1, 1, 1), 8, (8, 1, 1, 1)),
        ((-1, 2, 1, 2), 8, (2, 2, 1, 2)),
        ((1, -1, 1, 1), 8, (1, 8, 1, 1)),
        ((2, 1, -1, 1), 8, (2, 1, 4, 1)),
        ((2, 1, 1, -1), 8, (2, 1, 1, 4)),
        ((2, 2, 1, 2), 8, (2, 2, 1, 2)),
        ((-1, 1, 1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_minus_one_takes_the_remaining_devices(axes, count, expected):
    assert sharding.mesh_shape(MeshConfig(*axes), count) == expected


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ((3, 1, 1, 1), "must multiply to the 8 devices"),
        ((-1, 3, 1, 1), "must multiply to the 8 devices"),
        ((4, 1, 1, 1), "must multiply to the 8 devices"),
        ((16, 1, 1, 1), "must multiply to the 8 devices"),
        ((-1, -1, 1, 1), "only one axis may be -1"),
        ((1, 1, 0, 1), "at least 1 device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(axes, words):
    with pytest.raises(UserError, match=words):
        sharding.mesh_shape(MeshConfig(*axes), 8)


@pytest.mark.parametrize(
    ("fields", "name"), [({"batch_size": 12}, "batch_size=12"), ({"microbatch_size": 4}, "microbatch_size=4")]
)
def test_a_batch_that_cannot_be_shared_evenly_is_an_error(fields, name):
    with pytest.raises(UserError, match=f"{name} cannot be split evenly over 8 devices"):
        sharding.make_mesh(Config(**{"batch_size": 64, **fields}))
    sharding.make_mesh(Config(**{"batch_size": 64, **fields}, mesh=MeshConfig(model=2)))  # model is no batch axis


def test_reduce_dtype_needs_a_mesh_of_data_only():
    with pytest.raises(UserError, match="reduce_dtype=bfloat16"):
        sharding.make_mesh(Config(batch_size=64, mesh=MeshConfig(fsdp=2, reduce_dtype="bfloat16")))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A stand-in for a TPU device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize(
    ("shape", "crossing"), [((8, 1, 1, 1), 0), ((1, 8, 1, 1), 1), ((1, 4, 1, 2), 1), ((2, 4, 1, 1), 0)]
)
def test_one_axis_crosses_the_network_between_slices(shape, crossing):
    chips = [Chip(4 * i + j, i, (j % 2, j // 2, 0)) for i in range(2) for j in range(4)]
    devices = sharding._arranged(shape, chips)
    assert devices.shape == shape
    for number, half in enumerate(np.split(devices, 2, axis=crossing)):
        assert {chip.slice_index for chip in half.flat} == {number}


def test_a_mesh_without_an_axis_for_the_slices_is_an_error():
    chips = [Chip(i, i, (0, 0, 0)) for i in range(4)]
    with pytest.raises(UserError, match=r"data=2, fsdp=2.* has no axis that is a multiple of the 4 slices"):
        sharding._arranged((2, 2, 1, 1), chips)


def test_parameters_are_split_by_their_shapes():
    mesh = sharding.make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, model=2)))
    for shape, expected in {
        (): P(),
        (10,): P("model"),
        (7,): P(None),
        (6, 3, 32, 64): P(None, None, "fsdp", "model"),
        (3, 3, 5, 64): P(None, None, None, "model"),
        (64, 7): P("fsdp", None),
    }.items():
        assert sharding.partition_spec(shape, mesh) == expected


def test_a_tree_is_sharded_leaf_by_leaf():
    mesh = sharding.make_mesh(Config(mesh=MeshConfig(data=1, fsdp=-1)))
    tree = {"kernel": jnp.ones((16, 3)), "bias": jnp.ones(3)}
    placed = jax.device_put(tree, sharding.tree_shardings(tree, mesh))
    assert placed["kernel"].addressable_shards[0].data.shape == (2, 3)
    assert placed["bias"].addressable_shards[0].data.shape == (3,)
    assert sharding.bytes_per_device(placed) == 4 * (2 * 3 + 3)


def test_batches_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, model=2)))
    placed = jax.device_put(np.zeros((3, 8, 5)), sharding.batch_sharding(mesh, 1))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 2, 5)}
    assert jax.device_put(np.zeros(8), sharding.replicated(mesh)).is_fully_replicated
