"""JAX settings that change results are pinned and recorded, so that a run is the same in every environment."""

import contextlib
from unittest import mock

import jax
import linear
import numpy as np
import pytest

from research import app, randomness
from research.process import jax_settings
from research.randomness import Stream
from research.training import loop

OTHER = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


@contextlib.contextmanager
def _settings(values):
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _train(workdir):
    args = ["--config.batch_size=480", "--config.model.dropout=0.5", f"--workdir={workdir}"]
    with mock.patch.object(loop.Loop, "draw"):
        return app.run(linear.EXPERIMENT, args, devices=jax.devices()[:1])


@pytest.mark.slow
def test_a_run_has_the_same_result_under_other_settings(tmp_path, capsys):
    assert OTHER.keys() == jax_settings.PINNED.keys()
    usual = _train(tmp_path / "usual")
    assert "WARNING" not in capsys.readouterr().err
    with _settings(OTHER):
        other = _train(tmp_path / "other")
    for name in ("train_loss", "test_loss", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable"):
        assert other[name] == usual[name]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert "WARNING: JAX_ENABLE_X64=True is ignored: this program uses False" in warnings
    assert "WARNING: JAX_DEFAULT_PRNG_IMPL=rbg is ignored: this program uses threefry2x32" in warnings
    assert len(warnings) == len(OTHER)


def test_the_matmul_precision_is_the_users_and_recorded():
    assert jax_settings.settings()["jax_default_matmul_precision"] is None
    with _settings({"jax_default_matmul_precision": "highest"}):
        jax_settings.pin()
        assert jax_settings.settings()["jax_default_matmul_precision"] == "highest"


def test_keys_do_not_depend_on_the_default_generator():
    usual = jax.random.uniform(randomness.key(Stream.STEP, 3), 4)
    with _settings({"jax_default_prng_impl": "rbg"}):
        np.testing.assert_array_equal(jax.random.uniform(randomness.key(Stream.STEP, 3), 4), usual)
