"""Trackers receive the record over kills, resumes and failures; their flags. (Real ones: test_tracker_clients.py.)"""

import json
import shutil
import threading

import jax
import linear
import pytest
from command import complains, run_here
from drawn import read_lines, run, same

from launch import job
from research import app, flags
from research.errors import NonFiniteLossError, UserError
from research.record import trackers
from research.training import loop

STEPS = {"steps_per_dispatch": 1, "keep_checkpoints": 9}


class Fake:
    """A tracker whose runs are lists in memory; like a real one, it keeps every row that it is sent."""

    runs: dict = {}  # noqa: RUF012

    def __init__(self, workdir, experiment, run_id):
        self.key, self.name = run_id, experiment

    def open(self, config):
        self.run = self.runs.setdefault(self.key, {"rows": [], "images": [], "closed": [], "order": []})
        self.run["config"] = config
        return max((row["step"] for row in self.run["rows"]), default=-1), "in memory"

    def scalars(self, rows):
        self.run["rows"] += rows
        self.run["order"] += [row["step"] for row in rows]

    def image(self, name, png, step):
        self.run["images"].append((name, png[1:4], step))
        self.run["order"].append(name)

    def summary(self, summary):
        self.run["summary"] = summary

    def close(self, failed):
        self.run["closed"].append(failed)


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    monkeypatch.setattr(Fake, "runs", {})
    monkeypatch.setitem(trackers.CLIENTS, "wandb", ("json", Fake))


def _fake_run():
    (found,) = Fake.runs.values()
    return found


def test_a_tracker_receives_config_metrics_plots_and_summary(tmp_path, capsys):
    _, summary = run(tmp_path, trackers=["wandb"], plots=True)
    found = _fake_run()
    assert found["config"] == json.loads((tmp_path / "config.json").read_text())
    assert found["rows"] == read_lines(tmp_path)
    assert found["images"] == [(name, b"PNG", 22) for name in ("curves", "confusion", "reliability", "examples")]
    assert found["summary"] == summary
    assert found["closed"] == [False]
    assert "wandb: in memory" in capsys.readouterr().out.splitlines()


def test_it_receives_every_row_once_over_kills_and_resumes(stop, tmp_path):
    options = STEPS | {"trackers": ["wandb"]}
    stop(5, lambda signals: run(tmp_path, signals=signals, **options))
    stop(17, lambda signals: run(tmp_path, signals=signals, **options))
    found = _fake_run()
    assert [row["step"] for row in found["rows"]] == list(range(1, 17))  # the last row is not finished
    # Killed at step 17: the newest checkpoints are lost, and the tracker had not stored its last rows.
    for step in (11, 17):
        shutil.rmtree(tmp_path / f"checkpoints/{step}")
    del found["rows"][14:]
    run(tmp_path, **options)
    assert found["rows"] == read_lines(tmp_path)
    run(tmp_path, num_epochs=3, **options)
    assert found["rows"] == read_lines(tmp_path)
    assert found["config"]["num_epochs"] == 3
    assert _fake_run()["closed"] == [True, True, False, False]


def test_one_that_is_added_later_receives_the_rows_before(stop, tmp_path):
    stop(15, lambda signals: run(tmp_path, signals=signals, **STEPS))
    run(tmp_path, trackers=["wandb"], **STEPS)
    assert _fake_run()["rows"] == read_lines(tmp_path)


def test_a_rewound_run_sends_no_step_again(monkeypatch, tmp_path):
    advance, failing = loop.Training.dispatches, [True]

    def once(self, end):
        for step, metrics in advance(self, end):
            if step == 15 and failing:
                failing.clear()
                raise NonFiniteLossError("a loss became nan", 15)
            yield step, metrics

    monkeypatch.setattr(loop.Training, "dispatches", once)
    _, summary = run(tmp_path, trackers=["wandb"], max_rewinds=1, steps_per_dispatch=1)
    assert summary["rewinds"] == 1
    assert [row["step"] for row in _fake_run()["rows"]] == list(range(1, 23))


def test_a_failure_is_one_warning(monkeypatch, tmp_path, capsys):
    def full(self, rows):
        raise OSError("no space")

    monkeypatch.setattr(Fake, "scalars", full)
    state, summary = run(tmp_path / "one", trackers=["wandb"])
    same(state, run(tmp_path / "two")[0])
    assert json.loads((tmp_path / "one/summary.json").read_text()) == summary
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert warnings == ["WARNING: wandb no longer receives this run (no space): resuming it sends what is missing"]


def test_training_does_not_wait_for_one_that_hangs(monkeypatch, tmp_path, capsys):
    answered = threading.Event()
    monkeypatch.setattr(Fake, "scalars", lambda self, rows: answered.wait(60))
    monkeypatch.setattr(trackers, "_MAX_WAIT_SECONDS", 0.1)
    state, _ = run(tmp_path, trackers=["wandb"])
    assert state.step == 22
    assert "wandb has not stored everything yet: not waiting for it any longer" in capsys.readouterr().err
    answered.set()


def test_the_end_of_a_run_waits_for_all_trackers_only_so_long(monkeypatch, tmp_path, capsys):
    answered, warnings = threading.Event(), []
    monkeypatch.setattr(Fake, "scalars", lambda self, rows: answered.wait(9))
    monkeypatch.setattr(trackers, "_MAX_WAIT_SECONDS", 0.1)

    def tracker(name):
        (tracker,) = trackers.make(["wandb"], tmp_path, "linear", print, warnings.append)
        tracker.start({}, 1, [{"step": 1}])
        return tracker

    finished = tracker("finished")
    finished.summary({})
    monkeypatch.setattr(trackers, "_MAX_WAIT_SECONDS", 60)
    finished.close(failed=False)  # has waited for the summary
    assert len(warnings) == 1
    monkeypatch.setattr(trackers, "_MAX_WAIT_SECONDS_AFTER_STOP", 0.1)
    tracker("stopped").close(failed=True)
    assert len(warnings) == 2
    answered.set()


def test_a_plot_waits_for_the_row_of_its_step(tmp_path):
    for failed in (True, False):
        (tracker,) = trackers.make(["wandb"], tmp_path, "linear", print, print)
        tracker.start({}, 1, [])
        tracker.image("curves", b"?PNG", 1)
        if failed:  # the row is withheld: it is not finished
            tracker.close(failed=True)
            assert (_fake_run()["rows"], _fake_run()["images"]) == ([], [])
        else:
            tracker.scalars({"step": 1})
            tracker.scalars({"step": 2})
            tracker.close(failed=False)
    assert _fake_run()["images"] == [("curves", b"PNG", 1)]
    assert _fake_run()["order"] == [1, "curves", 2]


def test_the_flag_is_checked_before_any_work(env, tmp_path, monkeypatch, capsys):
    done = run_here(["--tracker=wandb,tensorbord", "--workdir=x"], capsys)
    complains(done, "--tracker=wandb,tensorbord: 'tensorbord' is unknown: use wandb, mlflow, or several")
    monkeypatch.setitem(trackers.CLIENTS, "mlflow", ("not_installed", Fake))
    complains(run_here(["--tracker=mlflow", "--workdir=x"], capsys), 'pip install -e ".[mlflow]"')
    (tmp_path / "not_installed").mkdir()  # MLflow and W&B name the folders of their files like their packages
    complains(run_here(["--tracker=mlflow", "--workdir=x"], capsys), 'pip install -e ".[mlflow]"')
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(trackers.CLIENTS, "mlflow", ("json", Fake))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"cannot be in memory://x: set MLFLOW_TRACKING_URI"):
        trackers.check(["mlflow"], "memory://x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    with pytest.raises(UserError, match="a URL with a password would appear in logs") as error:
        trackers.check(["mlflow"], tmp_path)
    assert "secret" not in str(error.value)
    for command in ("sweep", "plan"):
        with pytest.raises(UserError, match="--tracker is for the runs of an experiment, not of this command"):
            job.parse(command, "", linear.ModelConfig(), ["linear", "--tracker=wandb"])


def test_a_resumed_run_keeps_its_trackers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)

    def command(*args):
        return app.run(linear.EXPERIMENT, args, devices=jax.devices()[:1])

    command("--workdir=x", "--config.batch_size=256", "--tracker=wandb")
    rows = _fake_run()["rows"]
    assert rows == read_lines(tmp_path / "x")
    before = (tmp_path / "x/trackers.json").read_bytes()
    evaluated = command("--workdir=x", "--mode=eval")
    assert evaluated["step"] == rows[-1]["step"]
    assert (tmp_path / "x/trackers.json").read_bytes() == before
    with pytest.raises(UserError, match=r"--tracker=wandb is for training: leave it or --mode=eval out"):
        command("--workdir=x", "--mode=eval", "--tracker=wandb")
    command("--workdir=x", "--config.num_epochs=2")
    assert rows == read_lines(tmp_path / "x")
    # The run is finished: a tracker that lacks something, here everything, is sent it.
    finished, _ = _fake_run(), Fake.runs.clear()
    (tmp_path / "x/curves.png").write_bytes(b"?PNG")
    command("--workdir=x", "--config.num_epochs=2", "--tracker=wandb")
    found = _fake_run()
    assert found["rows"] == rows
    assert (found["config"], found["summary"]) == (finished["config"], finished["summary"])
    assert found["images"] == [("curves", b"PNG", rows[-1]["step"])]
    assert found["closed"] == [False]
    trackers.replay(("wandb",), tmp_path / "x", "linear")
    assert (found["rows"], len(found["images"])) == (rows, 1)
    assert flags.parse(linear.EXPERIMENT, ["--workdir=x"]).trackers == ("wandb",)
    assert flags.parse(linear.EXPERIMENT, ["--workdir=x", "--tracker="]).trackers == ()
    trackers.replay((), tmp_path / "x", "linear")
    assert flags.parse(linear.EXPERIMENT, ["--workdir=x"]).trackers == ()
    assert json.loads((tmp_path / "x/trackers.json").read_text())["run_id"] == json.loads(before)["run_id"]
    for text in ('{"run_id": "../..", "trackers": []}', '{"run_id": "01234567", "trackers": ["x"]}', "{}"):
        (tmp_path / "x/trackers.json").write_text(text)
        with pytest.raises(UserError, match=r"x/trackers\.json is damaged or of another version: delete it"):
            flags.parse(linear.EXPERIMENT, ["--workdir=x"])
