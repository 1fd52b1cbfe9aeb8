"""Predictions have every example once and in order, for any batch size and number of devices."""

import jax
import numpy as np
import pytest
from flax import nnx

from research import sharding
from research.config import Config
from research.tasks import predictor
from research.tasks.predictor import Predictor


def _scaled(model, batch, key):
    return {"scaled": batch["x"] * model.scale[...], "noise": jax.random.normal(key, batch["x"].shape)}


class Scale(nnx.Module):
    """Has one parameter."""

    def __init__(self):
        self.scale = nnx.Param(np.float32(3.0))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_every_example_once_and_in_order(devices, count):
    mesh = sharding.make_mesh(Config(), jax.devices()[:devices])
    predict = Predictor(*nnx.split(Scale(), nnx.Param, ...), mesh, 8)
    x = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    result = predict(_scaled, {"x": x})
    np.testing.assert_array_equal(result["scaled"], 3 * x)
    assert len(np.unique(result["noise"])) == 2 * count  # each batch has a different key
    np.testing.assert_array_equal(predict(_scaled, {"x": x})["noise"], result["noise"])
    assert not np.array_equal(predict(_scaled, {"x": x}, seed=1)["noise"], result["noise"])
    assert predict(_scaled, {"x": x}, batch_size=3)["scaled"].shape == (count, 2)


def test_progress_is_plain_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(predictor, "_PROGRESS_SECONDS", 0.0)
    mesh = sharding.make_mesh(Config(), jax.devices()[:1])
    predict = Predictor(*nnx.split(Scale(), nnx.Param, ...), mesh, 8)
    x = {"x": np.zeros((17, 2), np.float32)}
    predict(_scaled, x)
    assert not capsys.readouterr().out
    predict(_scaled, x, progress="what it is")
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"what it is: batch {number}/3" for number in (1, 2, 3)
    ]
