"""Devices of a population: members per device, and CPU cores as devices."""

import os
import subprocess
import sys
import types

import pytest

from research.training import population_devices


def test_small_batches_train_more_members_at_once():
    chosen = {batch: population_devices.at_once("gpu", batch) for batch in (32, 1024, 2000)}
    assert chosen == {32: 32, 1024: 1, 2000: 1}
    assert population_devices.at_once("cpu", 32) == 1


@pytest.mark.parametrize(
    ("platform", "devices", "members"), [("cpu", 1, 8), ("cpu", 2, 8), ("cpu", 3, 9), ("cpu", 16, 32), ("gpu", 4, 128)]
)
def test_every_device_has_members(platform, devices, members):
    assert population_devices.default_size([types.SimpleNamespace(platform=platform)] * devices) == members


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "most", "said"), [("", 0, "True 3 False"), ("", 2, "True 2 False"), ("count=4", 0, "False 4 False")]
)
def test_each_core_becomes_a_device_unless_the_user_sets_the_number(flags, most, said):
    code = (
        "import joblib; joblib.cpu_count = lambda: 3; import jax; "
        "from research.training.population_devices import split_cpu; "
        f"print(split_cpu({most}), jax.device_count(), split_cpu(0))"
    )
    env = os.environ | {"XLA_FLAGS": flags and f"--xla_force_host_platform_device_{flags}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr
