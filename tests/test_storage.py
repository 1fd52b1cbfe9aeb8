"""Workdirs on object stores, for which fsspec's memory:// stands in."""

import json
import os
import socket
import sys
import time

import fsspec
import pytest
from command import complains, run_here
from drawn import read_lines, run, same
from flax import nnx
from upath import UPath

from research import app, compare
from research.config import Config, DatasetConfig
from research.errors import RecordError, UserError
from research.record.workdir import Workdir
from research.tasks.classification import Classification


class Tiny(nnx.Module):
    """Softmax regression on the digits."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(32 * 32, 10, rngs=rngs)

    def __call__(self, images, *, train, key=None):
        return self.linear(images.reshape(len(images), -1))


def _config():
    return Config(num_epochs=1, batch_size=256, dataset=DatasetConfig(name="digits"))


@pytest.fixture
def store():
    yield UPath("memory://runs")
    fsspec.filesystem("memory").rm("/runs", recursive=True)


def test_a_remote_run_is_stopped_resumed_and_compared_like_a_local_one(store, stop, tmp_path, capsys):
    """Bit-identical state and equal lines."""
    state, summary = run(tmp_path / "whole")
    stop(15, lambda signals: run(store / "x", signals=signals, steps_per_dispatch=1))
    resumed, other = run(store / "x", pictures=True)
    same(resumed, state)
    assert other["test_loss"] == summary["test_loss"]
    assert read_lines(store / "x") == read_lines(tmp_path / "whole")
    assert json.loads((store / "x/summary.json").read_text()) == other
    assert (store / "x/curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((store / "x/checkpoints/whole.json").read_text()) == ["15", "22"]
    assert sorted(path.name for path in (store / "x/checkpoints").iterdir()) == ["15", "22", "whole.json"]
    compare.run(["memory://runs/x", str(tmp_path / "whole"), "--picture=memory://runs/both.png"])
    assert "test_loss" in capsys.readouterr().out
    assert (store / "both.png").exists()


def test_the_command_trains_evaluates_and_locks_its_workdir(store, capsys):
    experiment = app.Experiment("tiny", "", {"tiny": _config}, lambda *_: Classification(Tiny, (0.5,), (0.25,)))
    summary = app.run(experiment, ["--workdir=memory://runs/x"])
    assert "record: memory://runs/x" in capsys.readouterr().out
    assert not (store / "x/.lock").exists()
    looked = app.run(experiment, ["--mode=eval", "--workdir=memory://runs/x"])
    assert looked["test_loss"] == pytest.approx(summary["test_loss"])
    (store / "y").mkdir()
    claim = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "time": time.time()}
    (store / "y/.lock").write_text(json.dumps(claim))
    complains(run_here(["--workdir=memory://runs/y"], capsys), "in use by process")


@pytest.mark.parametrize(
    ("owner", "age", "stands"),
    [
        (f"process {os.getpid()} on {socket.gethostname()}", 0, True),
        (f"process 99999999 on {socket.gethostname()}", 0, False),
        ("process 99999999 on elsewhere", 3600, True),
        ("process 99999999 on elsewhere", 25 * 3600, False),
        (None, 0, False),
    ],
    ids=["alive", "dead", "other host", "other host, a day old", "no owner"],
)
def test_a_lock_holds_while_its_owner_may_be_alive(owner, age, stands, store):
    (store / "x").mkdir(parents=True)
    (store / "x/.lock").write_text(json.dumps({"owner": owner, "time": time.time() - age}))
    if stands:
        with (
            pytest.raises(UserError, match=r"delete memory://runs/x/\.lock if that run is no more"),
            Workdir(store / "x"),
        ):
            pass
    else:
        with Workdir(store / "x"), pytest.raises(UserError, match="in use"), Workdir(store / "x"):
            pass
        assert not (store / "x/.lock").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [("nothing://x", "Unsupported filesystem: 'nothing'"), ("s3://x/y", '"meshwork[s3]"'), ("az://x/y", "adlfs")],
)
def test_an_unavailable_file_system_is_named(path, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    done = run_here([f"--workdir={path}"], capsys)
    complains(done, path, words)


def test_an_interrupted_upload_is_not_restored(store, monkeypatch):
    run(store / "x", num_epochs=1)
    put = type(store.fs).put
    monkeypatch.setattr(type(store.fs), "put", lambda *_, **__: (_ for _ in ()).throw(OSError("out of reach")))
    with pytest.raises(RecordError, match=r"memory://runs/x/checkpoints could not be written \(out of reach\)"):
        run(store / "x")
    monkeypatch.setattr(type(store.fs), "put", put)
    with monkeypatch.context() as patch:
        patch.setattr(type(store.fs), "get", lambda *_, **__: (_ for _ in ()).throw(OSError("out of reach")))
        with pytest.raises(UserError, match=r"the checkpoints there cannot be read \(out of reach\)"):
            run(store / "x")
    (store / "x/checkpoints/22").mkdir()
    _, summary = run(store / "x")
    assert summary["num_train_steps"] == 22
    assert json.loads((store / "x/checkpoints/whole.json").read_text()) == ["11", "22"]
