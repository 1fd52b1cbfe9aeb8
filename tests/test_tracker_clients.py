"""Runs sent to the local stores of W&B and MLflow, over a kill and a resume, and read back from there."""

import json
import shutil
import struct
import time
from unittest import mock

import pytest
from drawn import read_lines, run

from research.record import drawing, mlflow_client, trackers, wandb_client
from research.training import loop

OPTIONS = {"steps_per_dispatch": 1, "keep_checkpoints": 9, "log_every_steps": 4}


def _draw(self):
    def draw():
        figure = drawing.figure(1, 1)
        figure.add_subplot().plot([1, 2])
        return figure

    self._writer.plot("curves", draw, self._run.progress.step)


@pytest.fixture
def resumed(stop, tmp_path, monkeypatch):
    """Returns a function that trains with a tracker, stops, loses a checkpoint, and resumes to the end."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials
    monkeypatch.setattr(loop.Loop, "draw", _draw)
    workdir = tmp_path / "run"

    def train(tracker):
        options = OPTIONS | {"trackers": [tracker]}
        stop(17, lambda signals: run(workdir, signals=signals, **options))
        shutil.rmtree(workdir / "checkpoints/17")
        return workdir, *run(workdir, plots=True, num_epochs=3, **options)

    return train


def _wandb_records(path):
    """Yields the records of a .wandb file: LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # no record begins in the last bytes of a block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + size > len(data):  # it is being written
            return
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def _wandb_run(path):
    """Returns the records of a run that has ended; W&B's own process may write the last ones after `finish` returns."""
    for _ in range(300):
        records = list(_wandb_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def _values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_wandb(resumed, capsys):
    pytest.importorskip("wandb")
    workdir, _, summary = resumed("wandb")
    out = capsys.readouterr().out
    assert "\nwandb: offline, since there is no API key (`wandb login`); `wandb sync " in out
    (path,) = workdir.glob("wandb/offline-run-*/*.wandb")
    assert path.stem == f"run-{json.loads((workdir / 'trackers.json').read_text())['run_id']}"
    records = _wandb_run(path)
    history = [_values(record.history.item) for record in records if record.HasField("history")]
    trackers.replay(["wandb"], workdir, "drawn_linear")  # the same command again
    (replayed,) = workdir.glob("wandb/offline-run-*/*.wandb")
    assert replayed != path
    again = [_values(record.history.item) for record in _wandb_run(replayed) if record.HasField("history")]
    assert [set(row) for row in again] == [set(row) for row in history]
    path = replayed
    numbers = [{n: x for n, x in row.items() if n[0] != "_" and "." not in n} for row in history]
    assert [{"step": row["_step"], **values} for row, values in zip(history, numbers)] == read_lines(workdir)
    assert (path.parent / "files" / history[-1]["curves.path"]).read_bytes()[1:4] == b"PNG"
    (start,) = (record.run for record in records if record.HasField("run"))
    assert (start.project, start.display_name) == ("drawn_linear", "run")
    configs = [_values(start.config.update), *(_values(r.config.update) for r in records if r.HasField("config"))]
    merged = {name: value for config in configs for name, value in config.items()}
    assert {n: x for n, x in merged.items() if n != "_wandb"} == json.loads((workdir / "config.json").read_text())
    found = {}
    for record in records:
        if record.HasField("summary"):
            found |= _values(record.summary.update)
    assert found["test_loss"] == summary["test_loss"]
    assert found["num_params"] == summary["num_params"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow calls what SQLAlchemy and the standard library deprecate
def test_mlflow(resumed):
    mlflow = pytest.importorskip("mlflow")
    workdir, _, summary = resumed("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    place = client.get_experiment_by_name("drawn_linear").experiment_id
    (found,) = client.search_runs([place])
    assert found.data.tags["meshwork_run_id"] == json.loads((workdir / "trackers.json").read_text())["run_id"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    lines = read_lines(workdir)
    for name in ("epoch", "loss", "learning_rate", "test_accuracy"):
        history = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        assert history == [(line["step"], line[name]) for line in lines if name in line]
    assert found.data.metrics["num_params"] == summary["num_params"]
    # A parameter cannot be changed, but the artifact can.
    assert (found.data.params["num_epochs"], found.data.params["optimizer.name"]) == ("2", "sgd")
    for name in ("config", "summary"):
        stored = client.download_artifacts(found.info.run_id, f"{name}.json")
        with open(stored) as file:
            assert json.load(file) == json.loads((workdir / f"{name}.json").read_text())
    (plot,) = client.list_artifacts(found.info.run_id, "plots")
    assert plot.path == "plots/curves.png"


def test_another_run_may_create_the_mlflow_experiment_at_the_same_time(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://shared")
    client = mock.MagicMock()
    client.create_experiment.side_effect = RuntimeError("it exists")
    client.get_experiment_by_name.side_effect = [None, mock.Mock(experiment_id="7"), None, None]
    client.search_runs.return_value = client.get_metric_history.return_value = []
    package = mock.Mock()
    package.MlflowClient.return_value = client
    monkeypatch.setattr(mlflow_client, "_import", lambda: package)
    mlflow_client.MlflowClient(tmp_path, "linear", "01234567").open({})
    assert client.create_run.call_args.args == ("7",)
    with pytest.raises(RuntimeError, match="it exists"):
        mlflow_client.MlflowClient(tmp_path, "linear", "01234567").open({})


def test_wandb_does_not_upload_without_end(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    init = mock.Mock(side_effect=RuntimeError("not in this test"))
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RuntimeError, match="not in this test"):
        wandb_client.WandbClient(tmp_path, "linear", "01234567").open({})
    settings = init.call_args.kwargs["settings"]
    assert 0 < settings.finish_timeout <= 15
    assert settings.finish_timeout_raises
