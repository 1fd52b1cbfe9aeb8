"""`launch.sweep` from its command line: the record, its end, how it goes on; bad input and lost storages."""

import csv
import html
import json
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import linear
import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from optuna.trial import TrialState  # noqa: E402

from launch import sweep  # noqa: E402
from launch.sweeps import processes as sweep_processes  # noqa: E402
from launch.sweeps.trials import Study, open_storage  # noqa: E402
from research import app  # noqa: E402
from research.errors import RecordError, UserError  # noqa: E402
from research.process.signals import StoppedError  # noqa: E402
from research.training import population_devices  # noqa: E402

RATE = "optimizer.learning_rate"


SWEEP = ["linear", "--population=2", "--workdir=w"]
WIDTHS = [*SWEEP, "--search=model.width=[4,6]", f"--search={RATE}=[0.01,0.1]", "--sampler=grid"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own, and one device."""
    import jax

    monkeypatch.chdir(tmp_path)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: one)
    return tmp_path


@pytest.mark.slow
def test_a_sweep_leaves_its_record_and_goes_on(folder, capsys):
    assert sweep.run(WIDTHS) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "w/sweep.json").read_text())
    assert (found["num_trials"], found["num_failed"], found["num_compilations"]) == (4, 0, 2)
    assert found["best_command"] in printed
    assert found["best_value"] == pytest.approx(found["best_command_value"], abs=0.02)
    assert 0 < found["test_accuracy"] < 1
    assert found["metric"] == "validation_accuracy"
    rows = list(csv.DictReader((folder / "w/trials.csv").open()))
    assert len(rows) == 4
    assert max(float(row["value"]) for row in rows) == found["best_value"]
    page = (folder / "w/sweep.html").read_text()
    assert found["best_command"].split()[-1] in page
    assert "<script src" not in page
    assert page.count("<section>") == 5
    # The command by itself: flags that the experiment understands, and the config of the trial.
    python, dash, module, *flags = shlex.split(found["best_command"])
    assert (python, dash, module) == ("python", "-m", "linear")
    config = app.parse(linear.EXPERIMENT, flags).config
    assert config.optimizer.learning_rate == found["best_params"][RATE]
    assert config.dataset.validation_fraction == 0.1
    assert sweep.run(WIDTHS) == 0
    assert "is finished" in capsys.readouterr().out
    for changed, words in (
        ([*WIDTHS, "--trials=5"], "the grid has 4 points"),
        ([*SWEEP, f"--search={RATE}=[0.3]", "--sampler=grid"], "search differs"),
        ([*SWEEP], "nothing to vary"),
        ([*WIDTHS, "--config.mesh.fsdp=2"], "must multiply to the 1 devices here"),
        ([*WIDTHS, "--config.max_rewinds=1"], "ends a trial at its first loss that is not finite"),
        ([*SWEEP, "--search=max_skipped_steps=[1,2]"], "ends a trial at its first loss that is not finite"),
        ([*WIDTHS, "--workdir=gs://x/y"], "must be on a local disk"),
        ([*WIDTHS, "--study=other"], "holds the record of the study linear"),
        ([*SWEEP, f"--search={RATE}=log(0.01,0.1)", "--storage=other.log"], r"another sweep \(search, grid differs"),
    ):
        with pytest.raises(UserError, match=words):
            sweep.run(changed)


@pytest.mark.slow
def test_where_each_core_is_a_device_the_best_command_has_the_one_that_it_has_by_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(population_devices, "split_cpu", lambda most: True)  # the tests have eight devices
    for population, words in ((0, "16 runs at a time on 8 cpu devices"), (3, "3 runs at a time on 3 cpu devices")):
        argv = ["linear", f"--workdir=w{population}", f"--search={RATE}=[0.01,0.1,0.2]", "--sampler=grid"]
        assert sweep.run([*argv, f"--population={population}"]) == 0
        assert words in capsys.readouterr().out
        (summary,) = tmp_path.glob(f"w{population}/best-*/summary.json")
        assert json.loads(summary.read_text())["device_count"] == 1
        found = json.loads((tmp_path / f"w{population}/sweep.json").read_text())
        assert found["best_value"] == pytest.approx(found["best_command_value"], abs=0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sweep_that_is_stopped_names_the_folder_that_goes_on(processes, folder, monkeypatch):
    def stopped(*_):
        raise StoppedError("stopped by SIGINT: the same command resumes", 2)

    monkeypatch.setattr(sweep if processes == 1 else sweep_processes, "_work" if processes == 1 else "run", stopped)
    argv = [arg for arg in SWEEP if not arg.startswith("--workdir")]
    with pytest.raises(StoppedError, match=r"resumes with --workdir=runs/sweep/\S+/\d\S+$") as error:
        sweep.run([*argv, f"--search={RATE}=[0.1,0.2]", f"--processes={processes}"])
    assert error.value.exit_code == 130


def test_a_sweep_that_only_fails_leaves_its_record(folder):
    with pytest.raises(UserError, match="trials in a row failed"):
        sweep.run([*SWEEP, f"--search={RATE}=[{','.join(f'{n}e30' for n in range(1, 11))}]", "--sampler=grid"])
    found = json.loads((folder / "w/sweep.json").read_text())
    assert (found["num_trials"], found["num_failed"], found["best_value"]) == (10, 10, None)
    assert len((folder / "w/trials.csv").read_text().splitlines()) == 11


@pytest.mark.slow
def test_the_end_of_a_finished_sweep_is_made_up_for(folder, capsys, monkeypatch):
    """Of one that was stopped while its best command ran, for all seeds; and of one whose fit is asked for later."""
    argv = [*SWEEP, "--search=dataset.train_fraction=[0.3,0.6,1]", "--sampler=grid", "--seeds=2"]
    with monkeypatch.context() as stopping:
        train = app.run

        def stopped(experiment, flags, signals, devices):
            signals.received = signal.SIGINT  # as it came while a step was made
            return train(experiment, flags, signals, devices)

        stopping.setattr(app, "run", stopped)
        with pytest.raises(StoppedError, match="checkpoint"):
            sweep.run(argv)
    path = folder / "w/sweep.json"
    assert "test_accuracy" not in json.loads(path.read_text())
    for again in (argv, [*argv, "--fit=examples"]):
        assert sweep.run(again) == 0
        found = json.loads(path.read_text())
        assert found["best_command_value"] == pytest.approx(found["best_value"], abs=0.02)
        assert found["test_accuracy_std"] >= 0
    assert found["fit"]["by"] == "examples"
    commands = found["best_command"].splitlines()
    assert [shlex.split(command)[-1] for command in commands] == ["--config.seed=0", "--config.seed=1"]
    assert html.escape(found["best_command"]) in (folder / "w/sweep.html").read_text()
    printed = capsys.readouterr().out
    assert all(command in printed for command in commands)
    before = path.stat().st_mtime_ns
    assert sweep.run([*argv, "--fit=examples"]) == 0
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        optuna.exceptions.StorageInternalError("No space left"),
        json.JSONDecodeError("No space left", "a journal", 0),
    ],
)
def test_a_storage_that_goes_away_or_is_written_over_is_one_line(error, folder, monkeypatch):
    monkeypatch.setattr(Study, "claim", lambda *_: (_ for _ in ()).throw(error))
    words = r"cannot be read or written: .*No space left(: line 1 .*)?; once that is fixed, the same command"
    with pytest.raises(RecordError, match=words):
        sweep.run([*SWEEP, f"--search={RATE}=log(1e-4,1)"])


@pytest.mark.slow
def test_what_a_python_file_makes_of_its_draws_is_in_the_record_and_the_command(env, folder):
    (folder / "search.py").write_text(
        f"def search(trial):\n    return {{'{RATE}': 10 ** trial.suggest_float('power', -2, -1)}}\n"
    )
    env["PYTHONPATH"] += f":{Path(__file__).parent}"
    argv = [*SWEEP, "--search=search.py", "--trials=2", "--sampler=halton"]
    command = [sys.executable, "-m", "launch.sweep", *argv]
    done = subprocess.run(command, env=env, cwd=folder, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    found = json.loads((folder / "w/sweep.json").read_text())
    (rate,) = found["best_params"].values()
    assert f"--config.{RATE}={rate}" in shlex.split(found["best_command"])
    assert found["best_command_value"] == pytest.approx(found["best_value"], abs=0.02)
    rows = list(csv.DictReader((folder / "w/trials.csv").open()))
    assert rate in [float(row[RATE]) for row in rows]


def test_the_record_has_its_folder_whatever_the_storage(folder):
    argv = [*SWEEP, f"--search={RATE}=[0.1]", "--sampler=grid", "--storage=sqlite:///x.db"]
    assert sweep.run(argv) == 0
    assert {path.name for path in (folder / "w").iterdir()} >= {"sweep.json", "trials.csv", "sweep.html", "best-0"}
    (folder / "file").touch()
    with pytest.raises(UserError, match="--workdir=file/w cannot be created: Not a directory"):
        sweep.run([*argv, "--workdir=file/w", "--study=other"])


def test_a_lock_that_a_killed_worker_left_is_taken_over(folder, monkeypatch):
    open_storage("", Path("w"))._backend._lock.acquire()
    now = iter(range(0, 10_000, 10))  # ten seconds a look
    clock = types.SimpleNamespace(monotonic=lambda: next(now), sleep=lambda _: None)
    monkeypatch.setattr("optuna.storages.journal._file.time", clock)
    assert optuna.create_study(storage=open_storage("", Path("w")), study_name="s").study_name == "s"


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_but_time(env, folder, capsys):
    """kill -9 while a trial runs; the same command then goes on, and the lost trial comes again."""
    argv = [*SWEEP, f"--search={RATE}=log(1e-3,1)", "--trials=3", "--config.num_epochs=2", "--sampler=random"]
    command = [sys.executable, "-m", "launch.sweep", *argv, "--processes=0", "--config.num_epochs=1000"]
    env["PYTHONPATH"] += f":{Path(__file__).parent}"
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL)
    journal = folder / "w/journal.log"
    deadline = time.monotonic() + 120
    while not (journal.exists() and '"intermediate_value"' in journal.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    study = optuna.load_study(study_name="linear", storage=open_storage("", folder / "w"))
    lost = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    identity = study.user_attrs["identity"]
    identity["config"]["num_epochs"] = 2  # so that the test need not train as long as the killed one would have
    study.set_user_attr("identity", identity)
    assert len(lost) == 2
    assert sweep.run(argv) == 0
    found = json.loads((folder / "w/sweep.json").read_text())
    assert (found["num_trials"], found["num_complete"]) == (3, 3)
    retried = {t.user_attrs["retry_of"]: t.params for t in study.trials if "retry_of" in t.user_attrs}
    assert retried == {trial.number: trial.params for trial in lost}
