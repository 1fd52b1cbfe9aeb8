"""Workdirs on object stores, for which fsspec's memory:// stands in."""

import json
import sys

import fsspec
import pytest
from command import complains, run_here
from drawn import read_lines, run, same
from etils import epath
from flax import nnx
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from upath import UPath

from research import app, compare, paths
from research.config import Config, DatasetConfig
from research.tasks.classification import Classification
from research.training import checkpoint


class Tiny(nnx.Module):
    """Softmax regression on the digits."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(32 * 32, 10, rngs=rngs)

    def __call__(self, images, *, train, key=None):
        return self.linear(images.reshape(len(images), -1))


def _config():
    return Config(num_epochs=1, batch_size=256, dataset=DatasetConfig(name="digits"))


@pytest.fixture
def store(monkeypatch, tmp_path):
    """fsspec's memory, as an object store; Orbax, which cannot write there, has a local folder for the checkpoints."""
    monkeypatch.setitem(paths._EXTRAS, "memory", "")
    monkeypatch.setattr(checkpoint, "_orbax_path", lambda _: epath.Path(tmp_path / "checkpoints"))
    yield UPath("memory://runs")
    fsspec.filesystem("memory").rm("/runs", recursive=True)


@pytest.mark.slow
def test_a_remote_run_is_stopped_resumed_and_compared_like_a_local_one(store, stop, tmp_path, capsys, monkeypatch):
    """Bit-identical state and equal lines."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_orbax_path", epath.Path)
        state, summary = run(tmp_path / "whole")
    stop(15, lambda signals: run(store / "x", signals=signals, steps_per_dispatch=1))
    resumed, other = run(store / "x", plots=True)
    same(resumed, state)
    assert other["test_loss"] == summary["test_loss"]
    assert read_lines(store / "x") == read_lines(tmp_path / "whole")
    assert json.loads((store / "x/summary.json").read_text()) == other
    assert (store / "x/curves.png").read_bytes().startswith(b"\x89PNG")
    files = sorted((store / "x/tensorboard").iterdir(), key=str)
    events = [event for file in files for event in LegacyEventFileLoader(str(file)).Load()]
    steps = [event.step for event in events if any(value.tag == "loss" for value in event.summary.value)]
    assert steps == [line["step"] for line in read_lines(store / "x")]
    compare.run(["memory://runs/x", str(tmp_path / "whole"), "--plot=memory://runs/both.png"])
    assert "test_loss" in capsys.readouterr().out
    assert (store / "both.png").exists()


def test_the_command_trains_and_evaluates(store, capsys):
    experiment = app.Experiment("tiny", "", {"tiny": _config}, lambda *_: Classification(Tiny, (0.5,), (0.25,)))
    summary = app.run(experiment, ["--workdir=memory://runs/x"])
    assert "record: memory://runs/x" in capsys.readouterr().out
    looked = app.run(experiment, ["--mode=eval", "--workdir=memory://runs/x"])
    assert looked["test_loss"] == pytest.approx(summary["test_loss"])


@pytest.mark.parametrize(
    ("path", "words"),
    [("nothing://x", "local folder, gs:// or s3://"), ("s3://x/y", '"meshwork[s3]"'), ("az://x/y", "gs:// or s3://")],
)
def test_an_unavailable_file_system_is_named(path, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    done = run_here([f"--workdir={path}"], capsys)
    complains(done, path, words)
