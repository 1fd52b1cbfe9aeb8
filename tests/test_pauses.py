"""Evaluations and checkpoints within an epoch: when they come, what they record, and that training does not notice."""

import dataclasses
import types

import pytest
from drawn import DATASET, read_lines, run, same, split

from research.config import Config
from research.process import distributed
from research.training import loop, pauses
from research.training.pauses import Pauses

VALIDATED = dataclasses.replace(DATASET, validation=split(2, 20))
# The learning rate is too high, so the validation loss goes up and down.
OPTIONS = {"dataset": VALIDATED, "rate": 1.0, "log_every_steps": 3, "eval_every_steps": 4}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run with evaluations within its epochs: its workdir, state and summary."""
    workdir = tmp_path_factory.mktemp("evaluated")
    return workdir, *run(workdir, **OPTIONS)


def _checkpoints(workdir):
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


def _is_evaluation(name):
    return name.startswith(("validation_", "test_"))


def test_evaluations_within_an_epoch_add_lines_and_change_nothing_else(evaluated, tmp_path):
    workdir, state, summary = evaluated
    plain, other = run(tmp_path, **OPTIONS | {"eval_every_steps": 0})
    same(state, plain)
    assert {n: x for n, x in summary.items() if _is_evaluation(n)} == {n: other[n] for n in other if _is_evaluation(n)}
    lines = {line["step"]: line for line in read_lines(workdir)}
    assert [step for step, line in lines.items() if "test_loss" in line] == [4, 8, 11, 12, 16, 20, 22]
    assert lines[4].keys() == {"step", "epoch", *filter(_is_evaluation, lines[11])}
    assert (lines[8]["epoch"], lines[12]["epoch"]) == (1, 2)
    for step in (4, 8, 12, 16, 20):
        lines[step] = {name: value for name, value in lines[step].items() if not _is_evaluation(name)}
    assert [line for line in lines.values() if line.keys() > {"step", "epoch"}] == read_lines(tmp_path)


def test_they_have_the_results_of_a_run_that_ends_there(evaluated, tmp_path, capsys):
    line = next(line for line in read_lines(evaluated[0]) if line["step"] == 16)
    _, summary = run(tmp_path, **OPTIONS | {"num_steps": 16, "eval_every_steps": 8})
    assert {name: summary[name] for name in line if _is_evaluation(name)} == {
        name: line[name] for name in line if _is_evaluation(name)
    }
    assert "\nstep 8/16  test_accuracy" in capsys.readouterr().out.replace("validation", "test")


def test_the_best_of_them_has_a_checkpoint(evaluated):
    workdir, _, summary = evaluated
    losses = {line["step"]: line["validation_loss"] for line in read_lines(workdir) if "validation_loss" in line}
    best = min(losses, key=losses.get)
    assert best not in (11, 22)
    assert (summary["best_step"], summary["best_validation_loss"]) == (best, losses[best])
    assert best in _checkpoints(workdir)


@pytest.mark.parametrize("step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 19))])
def test_a_run_that_is_stopped_and_resumed_evaluates_the_same(step, evaluated, stop, tmp_path):
    workdir, state, summary = evaluated
    stop(step, lambda signals: run(tmp_path, signals=signals, steps_per_dispatch=1, **OPTIONS))
    resumed, other = run(tmp_path, **OPTIONS)
    same(resumed, state)
    assert read_lines(tmp_path) == read_lines(workdir)
    assert other["best_step"] == summary["best_step"]


def test_checkpoints_by_the_clock(monkeypatch, tmp_path):
    """Of a clock that advances a minute with each step; the checkpoint at the end of an epoch counts, too."""
    seconds, record = [0.0], loop.Loop._record

    def slow_record(self, metrics):
        seconds[0] += 60 * len(metrics["loss"])
        record(self, metrics)

    monkeypatch.setattr(loop.Loop, "_record", slow_record)
    monkeypatch.setattr(pauses, "time", types.SimpleNamespace(monotonic=lambda: seconds[0]))
    state, _ = run(tmp_path / "clock", checkpoint_every_minutes=3.0, keep_checkpoints=100)
    assert _checkpoints(tmp_path / "clock") == {3, 6, 9, 11, 14, 17, 20, 22}
    same(run(tmp_path / "plain", keep_checkpoints=100)[0], state)
    assert _checkpoints(tmp_path / "plain") == {11, 22}


def test_all_processes_follow_the_clock_of_the_first(monkeypatch):
    own = []
    monkeypatch.setattr(distributed, "from_first", lambda value: own.append(value) or told.pop(0))
    told = [5.0, 0.0]
    of_another = Pauses(Config(checkpoint_every_minutes=1e6, checkpoint_every_steps=4))
    assert [of_another.next(step, 100) for step in (0, 1)] == [1, 2]
    assert not of_another.saves(1)
    assert [of_another.next(step, 100) for step in (1, 4)] == [4, 6]
    assert of_another.saves(4)
    assert len(own) == 1  # the clocks are compared at few steps only
    assert of_another.saves(6)
    assert own[1] > 0  # it would not have saved by its own clock
    of_another.restart(6)
    assert of_another.next(6, 100) == 7
