"""A run that is stopped and resumed ends as if never stopped. (Killed runs: faults/test_kill.py.)"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time

import jax
import pytest
from command import COMMAND, DIGITS, complains, read_summary, run_here
from drawn import DATASET, read_lines, run, same, split

from experiments import cifar_cnn
from research import app, flags
from research.config import OptimizerConfig
from research.errors import UserError
from research.process.signals import Signals, StoppedError
from research.record import writer
from research.training import run as run_module
from research.training.checkpoint import Checkpoints


def _without_times(summary):
    return {
        name: value for name, value in summary.items() if not name.endswith("_seconds") and "per_second" not in name
    }


@pytest.fixture
def stop_at(stop):
    """Runs the tiny experiment and stops it with a signal at a step."""
    return lambda workdir, step, **options: stop(step, lambda signals: run(workdir, signals=signals, **options))


@pytest.fixture(scope="module", params=[1, 5])
def whole_run(request, tmp_path_factory):
    """A run that was never stopped: its options, workdir, state and summary."""
    options = {"dataset": dataclasses.replace(DATASET, validation=split(2, 20)), "log_every_steps": request.param}
    workdir = tmp_path_factory.mktemp("whole")
    return options, workdir, *run(workdir, **options)


@pytest.mark.parametrize("step", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 11, 12, 21))])
def test_a_run_stopped_at_any_step_resumes_to_the_same_result(step, whole_run, stop_at, tmp_path):
    """Bit-identical parameters and metrics; every line once and in order."""
    options, workdir, state, summary = whole_run
    assert f"at step {step} " in stop_at(tmp_path / "stopped", step, steps_per_dispatch=1, **options)
    resumed, other = run(tmp_path / "stopped", steps_per_dispatch=3, **options)
    same(resumed, state)
    assert _without_times(other) == _without_times(summary)
    assert read_lines(tmp_path / "stopped") == read_lines(workdir)


def _saved_progress(workdir, step):
    return json.loads((workdir / f"checkpoints/{step}/record/metadata").read_text())["progress"]


def test_a_signal_in_the_last_dispatch_of_an_epoch_comes_after_its_evaluation(stop_at, tmp_path):
    """Or the checkpoint of that step would have no results, and resuming, which does not save it again, none either."""
    stop_at(tmp_path, 11, steps_per_dispatch=11, dataset=dataclasses.replace(DATASET, validation=split(2, 20)))
    progress = _saved_progress(tmp_path, 11)
    assert progress["epoch"] == 1
    assert progress["best"] == [progress["results"]["validation_loss"], 11]


def test_a_signal_in_the_last_dispatch_of_all_ends_a_finished_run(monkeypatch, tmp_path):
    signals, progress = Signals(), writer.Writer.progress

    def stopping(self, step, *args):
        progress(self, step, *args)
        signals.received = signal.SIGTERM if step == 22 else None

    monkeypatch.setattr(writer.Writer, "progress", stopping)
    _, summary = run(tmp_path, signals=signals)
    assert _saved_progress(tmp_path, 22)["results"]["test_loss"] == summary["test_loss"]
    assert read_summary(tmp_path)["test_loss"] == summary["test_loss"]


@pytest.mark.slow
def test_a_run_stopped_repeatedly_ends_the_same(stop_at, tmp_path):
    state, _ = run(tmp_path / "whole")
    for step in (3, 6, 11, 15):
        stop_at(tmp_path / "stopped", step, steps_per_dispatch=1)
    same(run(tmp_path / "stopped")[0], state)
    assert read_lines(tmp_path / "stopped") == read_lines(tmp_path / "whole")


def test_checkpoints_within_an_epoch(tmp_path):
    run(tmp_path, checkpoint_every_steps=4, keep_checkpoints=100)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {4, 8, 11, 12, 16, 20, 22}


def test_resuming_on_another_number_of_devices(stop_at, tmp_path):
    _, summary = run(tmp_path / "whole")
    stop_at(tmp_path / "stopped", 9, steps_per_dispatch=1)
    _, other = run(tmp_path / "stopped", devices=8)
    assert other["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-4)
    assert other["device_count"] == 8


def test_the_best_step_is_in_the_summary(tmp_path):
    dataset = dataclasses.replace(DATASET, validation=split(2, 20))
    _, summary = run(tmp_path, dataset=dataset, num_epochs=4)
    losses = {line["step"]: line["validation_loss"] for line in read_lines(tmp_path) if "validation_loss" in line}
    assert summary["best_step"] == min(losses, key=losses.get)
    assert summary["best_validation_loss"] == min(losses.values())


@pytest.mark.slow
def test_every_extension_is_recorded_and_cannot_be_reproduced(stop_at, tmp_path):
    """The schedules of the first steps were those of fewer epochs."""
    decaying = {"optimizer": OptimizerConfig(name="sgd", learning_rate=0.1, schedule="linear"), "dataset": DATASET}
    _, summary = run(tmp_path, num_epochs=1, **decaying)
    assert "extended" not in summary
    stop_at(tmp_path, 14, num_epochs=2, steps_per_dispatch=1, **decaying)
    with pytest.raises(UserError, match=r"of num_epochs=1, but config\.json has num_epochs=2: finish that extension"):
        flags.parse(cifar_cnn.EXPERIMENT, [f"--reproduce={tmp_path}/summary.json"])
    _, summary = run(tmp_path, num_epochs=2, **decaying)
    assert summary["extended"] == [{"num_epochs": 1, "step": 11}]
    _, summary = run(tmp_path, num_epochs=3, **decaying)
    assert summary["extended"] == [{"num_epochs": 1, "step": 11}, {"num_epochs": 2, "step": 22}]
    assert read_summary(tmp_path)["extended"] == summary["extended"]
    with pytest.raises(UserError) as error:
        flags.parse(cifar_cnn.EXPERIMENT, [f"--reproduce={tmp_path}/summary.json"])
    words = "the schedules of num_epochs=1 up to step 11, of num_epochs=2 up to step 22, and then those of num_epochs=3"
    assert words in str(error.value)
    assert "train with --config.num_epochs=1, and extend that run in the same way" in str(error.value)


def _output(args, capsys):
    """Runs the command in this process on one device; returns its stdout."""
    app.run(cifar_cnn.EXPERIMENT, args, devices=jax.devices()[:1])
    return capsys.readouterr().out


def _start(env, *args):
    return subprocess.Popen([*COMMAND, *args], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _wait_for_checkpoint(workdir, process):
    deadline = time.monotonic() + 120
    while not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_running_workdir_is_locked_evaluated_and_stopped_by_sigterm(env, tmp_path, capsys):
    process = _start(env, *DIGITS, "--config.num_epochs=10000", "--workdir=x")
    _wait_for_checkpoint(tmp_path / "x", process)
    locked = run_here(["--workdir=x"], capsys)
    complains(locked, "--workdir=x is in use by", f"process {process.pid} on {os.uname().nodename}")
    assert "cifar_cnn on digits, step " in _output(["--mode=eval", "--workdir=x"], capsys)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("error: stopped by SIGTERM at step ")
    complains(run_here(["--workdir=x", "--config.model.width=5"], capsys), "model.width 4 there, 5 here")
    complains(run_here(["--workdir=x", "--config.num_epochs=3"], capsys), "has num_epochs=10000 (")


@pytest.mark.slow
def test_a_finished_run_is_only_evaluated_and_can_be_reproduced(env, tmp_path, capsys):
    _output([*DIGITS, "--workdir=x"], capsys)
    summary = (tmp_path / "x/summary.json").read_bytes()
    again = _output(["--workdir=x"], capsys)
    assert "the run in x is finished" in again
    figures = json.loads(summary)
    assert f"step {figures['num_train_steps']}: test accuracy {figures['test_accuracy']:.4f}" in again
    assert (tmp_path / "x/summary.json").read_bytes() == summary

    changed = figures | {"jax_version": "0.1"}
    (tmp_path / "x/summary.json").write_text(json.dumps(changed))
    reproduced = _output(["--reproduce=x/summary.json", "--workdir=y"], capsys)
    first, last = [line for line in reproduced.splitlines() if line.startswith("reproduced: ")]
    assert first.startswith("reproduced: jax_version 0.1 there, ")
    figures_there = "train_accuracy, train_grad_norm, train_loss, test_accuracy, test_loss, test_calibration_error"
    assert last == f"reproduced: the same {figures_there}"
    assert read_summary(tmp_path / "y")["test_loss"] == figures["test_loss"]
    # config.json holds the resolved learning rate of its own update rule, not those of others.
    words = "--config.optimizer.name=sgd: the record of --reproduce has momentum"
    complains(run_here(["--reproduce=x/summary.json", "--config.optimizer.name=sgd", "--workdir=z"], capsys), words)
    # A preset starts from its own defaults.
    args = ["--reproduce=x/summary.json", "--config=tutorial", "--config.optimizer.name=sgd"]
    flags.parse(cifar_cnn.EXPERIMENT, args)
    (tmp_path / "y/summary.json").write_text('{"a": 1}')
    complains(run_here(["--workdir=y"], capsys), "y/summary.json is not a run's: delete it")
    complains(run_here(["--reproduce=nowhere/summary.json"], capsys), "no such file")
    complains(run_here(["--mode=eval", "--workdir=nowhere"], capsys), "no config.json in nowhere")


def test_damaged_lines_of_metrics_are_dropped(stop_at, tmp_path, capsys):
    stop_at(tmp_path, 11)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([whole[0], b"\xff garbage\n", b"[1]\n", *whole[2:]]))
    run(tmp_path)
    assert "WARNING: metrics.jsonl: 2 damaged lines left out" in capsys.readouterr().err
    steps = [line["step"] for line in read_lines(tmp_path)]
    assert steps == sorted(set(steps))
    assert len(steps) > len(whole)


def test_restoring_frees_the_initial_state_first(stop_at, tmp_path, monkeypatch):
    stop_at(tmp_path, 11)
    restore, deleted = Checkpoints.restore, []

    def restore_and_record(self, like, step):
        deleted.extend(leaf.is_deleted() for leaf in jax.tree.leaves(initial[0]))
        return restore(self, like, step)

    initial = []
    create_state = run_module.create_state

    def create_and_record(*args):
        made = create_state(*args)
        initial.append(made[1])
        return made

    monkeypatch.setattr(Checkpoints, "restore", restore_and_record)
    monkeypatch.setattr(run_module, "create_state", create_and_record)
    run(tmp_path)
    assert deleted
    assert all(deleted)


def test_a_signal_whose_error_was_swallowed_still_stops_the_run(tmp_path):
    """As when it arrives during an import inside `except Exception`."""
    signals = Signals()
    with signals.handled(), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)
    signals.is_distributed = True  # as with several processes, which only stop by this error
    with pytest.raises(StoppedError, match="stopped by SIGTERM"), signals.deferred():
        pass
    signals.is_distributed = False
    with pytest.raises(StoppedError, match="stopped by SIGTERM") as stopped:
        run(tmp_path, signals=signals)
    assert stopped.value.exit_code == 143


def test_an_unreadable_config_is_named(env, tmp_path, capsys):
    folder = tmp_path / "x"
    folder.mkdir()
    for text in ("{", "[]", "{}", '{"seed": "a"}'):
        (folder / "config.json").write_text(text)
        complains(run_here(["--workdir=x"], capsys), "config.json")
