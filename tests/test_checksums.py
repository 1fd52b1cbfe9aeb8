"""Checksums of sharded arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding
from research.config import Config, MeshConfig
from research.training.checksums import checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_the_checksum_has_its_closed_form_and_detects_every_flipped_bit(dtype):
    array = np.array(jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)) * 9, dtype))
    bits = array.view(f"uint{8 * array.itemsize}").ravel()

    def closed_form(values):
        return sum(int(v) * ((i * 2654435761 % 2**32) | 1) for i, v in enumerate(values)) % 2**32

    whole = closed_form(bits)
    for axes in ({}, {"data": 1, "fsdp": 4}, {"data": 2, "fsdp": 2, "model": 2}):
        config = Config(batch_size=8, mesh=MeshConfig(**axes))
        mesh = sharding.make_mesh(config, jax.devices()[: int(np.prod([*axes.values()]))])
        placed = jax.device_put(array, sharding.tree_shardings(array, mesh))
        assert checksums({"array": placed}) == {"array": whole}
    for i in range(bits.size):
        for bit in range(8 * array.itemsize):
            flipped = bits.copy()
            flipped[i] ^= 1 << bit
            assert closed_form(flipped) != whole
