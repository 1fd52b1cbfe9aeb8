"""Callbacks: when they are called and with what, how they stop a run, and that a resumed run does not notice."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import linear
import pytest
from command import DIGITS, read_summary
from drawn import DATASET, read_lines, run, same, split

from launch.sweeps.options import SweepOptions, check_search
from research import app
from research.errors import UserError
from research.process import distributed
from research.training import loop
from research.training.callbacks import Callback

VALIDATED = dataclasses.replace(DATASET, validation=split(2, 20))


class Record(Callback):
    """Keeps in its state what it was called with, and checks that the run is at that step."""

    every_steps = 4

    def _add(self, run, *values):
        assert int(run.state.step) == run.progress.step
        self.state.setdefault("calls", []).append([run.progress.step, *values])

    def on_step(self, run, metrics):
        self._add(run, metrics["loss"])

    def on_epoch(self, run, results):
        self._add(run, results["train_loss"], results["validation_loss"])

    def on_end(self, run, summary):
        self._add(run, summary["test_loss"])
        self.ended = self.state["calls"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with a callback: its workdir, state, and what the callback was called with."""
    workdir, callback = tmp_path_factory.mktemp("recorded"), Record()
    state, _ = run(workdir, dataset=VALIDATED, callbacks=[callback])
    return workdir, state, callback.ended


def test_hooks_are_called_at_their_steps_with_what_the_record_has(recorded):
    workdir, _, calls = recorded
    lines = {line["step"]: line for line in read_lines(workdir)}
    steps = [[step, lines[step]["loss"]] for step in (4, 8, 12, 16, 20)]
    epochs = [[step, lines[step]["train_loss"], lines[step]["validation_loss"]] for step in (11, 22)]
    assert calls == [*steps[:2], epochs[0], *steps[2:], epochs[1], [22, lines[22]["test_loss"]]]


def test_they_change_nothing(recorded, tmp_path):
    same(run(tmp_path, dataset=VALIDATED)[0], recorded[1])
    assert read_lines(tmp_path) == read_lines(recorded[0])


@pytest.mark.parametrize("step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 11, 19))])
def test_their_state_is_that_of_a_run_that_was_never_stopped(step, recorded, stop, tmp_path):
    first, second = Record(), Record()
    options = {"dataset": VALIDATED, "steps_per_dispatch": 1}
    stop(step, lambda signals: run(tmp_path, signals=signals, callbacks=[first], **options))
    state, _ = run(tmp_path, callbacks=[second], **options)
    same(state, recorded[1])
    assert second.ended == recorded[2]


def test_a_rewind_also_rewinds_their_state(tmp_path, monkeypatch):
    """The loss of the 15th step becomes NaN once: the steps since the checkpoint of step 11 are made again."""
    from research.training import run as run_module

    callback, device_get, left = Record(), jax.device_get, [15]

    def poisoned(tree):
        values = device_get(tree)
        if isinstance(values, dict) and "grad_norm" in values:
            left[0] -= 1
            if not left[0]:
                values = values | {"loss": values["loss"] * float("nan")}
        return values

    monkeypatch.setattr(run_module.jax, "device_get", poisoned)
    run(tmp_path, dataset=VALIDATED, callbacks=[callback], max_rewinds=1, steps_per_dispatch=1)
    assert [call[0] for call in callback.ended] == [4, 8, 11, 12, 16, 20, 22, 22]


class StopAt(Callback):
    """Stops the run at a step or at the end of an epoch."""

    every_steps = 5

    def __init__(self, step):
        self.step = step

    def on_step(self, run, metrics):
        return "enough" if run.progress.step == self.step else None

    on_epoch = on_step


@pytest.mark.slow
@pytest.mark.parametrize("step", [11, 15])
def test_a_stop_is_an_end_like_any_other(step, stop, tmp_path):
    """With evaluation, checkpoint and summary; also if the run is killed before or just after it; and it can go on."""
    state, summary = run(tmp_path / "one", callbacks=[StopAt(step)])
    assert (state.step, summary["num_train_steps"]) == (step, step)
    assert summary["stopped_early"] == "StopAt: enough"
    (shorter, other) = run(tmp_path / "shorter", num_steps=step)
    same(state, shorter)
    assert summary["test_loss"] == other["test_loss"]

    def stopping(signals):
        run(tmp_path / "two", signals=signals, callbacks=[StopAt(step)], steps_per_dispatch=1)

    stop(step - 1, stopping)
    same(run(tmp_path / "two", callbacks=[StopAt(step)])[0], state)
    (tmp_path / "two/summary.json").unlink()
    same(run(tmp_path / "two", callbacks=[StopAt(step)])[0], state)
    assert read_summary(tmp_path / "two")["stopped_early"] == "StopAt: enough"

    longer, summary = run(tmp_path / "two", num_epochs=3)
    same(longer, run(tmp_path / "three", num_epochs=3)[0])
    assert "stopped_early" not in summary


def test_an_exception_leaves_the_checkpoint_intact(tmp_path):
    class Broken(Record):
        def on_step(self, run, metrics):
            if run.progress.step == 16:
                raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug") as raised:
        run(tmp_path, callbacks=[Broken()], dataset=VALIDATED)
    assert raised.traceback[-1].name == "on_step"
    assert not (tmp_path / "summary.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["11"]
    same(run(tmp_path, dataset=VALIDATED)[0], run(tmp_path / "whole", dataset=VALIDATED)[0])


def test_impossible_periods_and_sweeps_are_refused(tmp_path):
    callback = StopAt(1)
    callback.every_steps = -1
    with pytest.raises(UserError, match=r"callback 0\.StopAt: every_steps=-1 must be at least 0"):
        run(tmp_path, callbacks=[callback])
    experiment = dataclasses.replace(linear.EXPERIMENT, callbacks=lambda _: [Record()])
    with pytest.raises(UserError, match="linear has callbacks, which a sweep does not call"):
        check_search(experiment, SweepOptions(search=("optimizer.learning_rate=log(1e-3,1)",)), linear.get_config())


def _example():
    """The callback that docs/how-to/callbacks.md shows."""
    text = (Path(__file__).parent.parent / "docs/how-to/callbacks.md").read_text()
    names = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    return names["TargetReached"]


@pytest.mark.slow
def test_the_command_makes_them_from_its_config_and_says_how_to_train_further(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)
    example, seeds = _example(), []
    experiment = dataclasses.replace(
        linear.EXPERIMENT, callbacks=lambda config: [seeds.append(config.seed), example(target=0.1)][1:]
    )

    def command(*args):
        return app.run(experiment, args, devices=jax.devices()[:1])

    digits = [*DIGITS, "--config.dataset.validation_fraction=0.1", "--config.num_epochs=6", "--config.seed=3"]
    summary = command(*digits, "--workdir=x")
    assert seeds == [3]
    assert summary["num_train_steps"] == 2 * 13
    assert summary["stopped_early"] == "TargetReached: validation accuracy of 0.1 in two epochs in a row"
    capsys.readouterr()
    command("--workdir=x")
    out = capsys.readouterr().out
    assert "the run in x was stopped by TargetReached: validation accuracy of 0.1 in two epochs in a row" in out
    assert "Evaluating it; a larger --config.num_epochs trains it further" in out
    assert command("--workdir=x", "--config.num_epochs=7")["num_train_steps"] == 40  # and it stops again


# Only the second process asks for a stop, within an epoch.
ASKING = """
import dataclasses, jax, linear
from research import app
from research.training.callbacks import Callback

class Ask(Callback):
    every_steps = 3
    def on_step(self, run, metrics):
        return "asked" if jax.process_index() and run.progress.step == 6 else None
    def on_end(self, run, summary):
        print("ended at", run.progress.step, flush=True)

EXPERIMENT = dataclasses.replace(linear.EXPERIMENT, callbacks=lambda _: [Ask()])

if __name__ == "__main__":
    app.main(EXPERIMENT)
"""


def test_a_stop_of_another_process_stops_this_one(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "in_any_process", lambda value: asked.append(value) or len(asked) == 3)
    state, summary = run(tmp_path, callbacks=[StopAt(99)])
    assert asked == [False] * 4  # at the steps 5, 10, 11 (its epoch's end), and at the end
    assert (state.step, summary["stopped_early"]) == (11, "a callback of another process")


@pytest.mark.slow
def test_all_processes_stop_where_one_asks_for_it(env, tmp_path):
    (tmp_path / "asking.py").write_text(ASKING)
    env = env | {"PYTHONPATH": f"{env['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "launch.local", "asking", "--processes=2", *DIGITS, "--workdir=x"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ended = sorted(line for line in done.stdout.splitlines() if "ended" in line)
    assert ended == ["[0] ended at 6", "[1] ended at 6"]
    summary = read_summary(tmp_path / "x")
    assert (summary["num_train_steps"], summary["stopped_early"]) == (6, "a callback of another process")
