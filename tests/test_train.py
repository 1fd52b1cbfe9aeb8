"""The training loop: its record, its evaluation, and when it stops."""

import dataclasses
import json
import math
import re
import sys
import types

import jax
import numpy as np
import pytest
from drawn import DATASET, read_lines, run, same, split

from research.config import OptimizerConfig
from research.errors import NonFiniteLossError
from research.record import writer
from research.training import loop
from research.training import run as run_module


def test_the_run_record(tmp_path, capfd):
    state, summary = run(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    expected = {
        "experiment": "drawn_linear",
        "dataset": "drawn",
        "num_train_steps": 22,  # 2 epochs of 90 examples, in whole batches of 8
        "num_epochs": 2,
        "global_batch_size": 8,
        "platform": "cpu",
        "device_count": 1,
        "process_count": 1,
        "num_params": 36 * 3 + 3,
        "jax_version": jax.__version__,
    }
    assert {name: summary[name] for name in expected} == expected
    for name in ("examples_per_second", "compile_seconds", "train_seconds", "wall_seconds"):
        assert summary[name] > 0
    assert summary["compile_seconds"] + summary["train_seconds"] <= summary["wall_seconds"]
    assert state.step == 22
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["learning_rate"] == 0.1

    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 23))  # one line per step, in order
    assert [line["epoch"] for line in lines] == [1] * 11 + [2] * 11
    assert all({"loss", "accuracy", "grad_norm", "learning_rate"} <= line.keys() for line in lines)
    ends = [line for line in lines if "test_loss" in line]
    assert [line["step"] for line in ends] == [11, 22]
    assert {name: ends[-1][name] for name in ("train_loss", "test_loss", "test_accuracy")} == {
        name: summary[name] for name in ("train_loss", "test_loss", "test_accuracy")
    }
    assert math.isclose(summary["train_loss"], np.mean([line["loss"] for line in lines[11:]]), rel_tol=1e-6)
    assert summary["test_accuracy"] > 0.5  # of three classes
    out = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out if line.startswith("epoch")] == [["epoch", "1/2"], ["epoch", "2/2"]]


@pytest.mark.parametrize(("every", "steps"), [(5, [5, 10, 11, 15, 20, 22]), (100, [11, 22])])
def test_log_every_steps(every, steps, tmp_path):
    run(tmp_path, log_every_steps=every)
    assert [line["step"] for line in read_lines(tmp_path)] == steps  # an epoch always ends with a line


def test_progress_is_plain_lines_without_a_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(writer, "_SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    run(tmp_path, steps_per_dispatch=11)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 2
    assert re.fullmatch(r"step 11/22  loss \d\.\d{4}  [\d,]+ examples/s  \d\d:\d\d left", lines[0])


@pytest.mark.parametrize(("steps", "has_bar"), [(5, True), (0, False)])
def test_a_terminal_has_a_bar_for_steps_only(steps, has_bar, tmp_path, monkeypatch, capfd):
    """An evaluation, which makes no steps, has none."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with writer.Writer(tmp_path, steps, active=True):
        pass
    assert ("0/5" in capfd.readouterr().err) == has_bar


def test_the_recorded_learning_rate_follows_the_schedule(tmp_path):
    run(tmp_path, optimizer=OptimizerConfig(name="sgd", learning_rate=0.2, schedule="linear"))
    np.testing.assert_allclose(
        [line["learning_rate"] for line in read_lines(tmp_path)], 0.2 * (1 - np.arange(22) / 22), rtol=1e-5
    )


def test_steps_per_dispatch_changes_only_the_number_of_calls(tmp_path, monkeypatch):
    calls = []
    take = run_module.TrainBatches.take
    monkeypatch.setattr(run_module.TrainBatches, "take", lambda self, count: calls.append(count) or take(self, count))
    states, counts = [], []
    for steps in (1, 4, 100, 0):
        calls.clear()
        states.append(run(tmp_path / str(steps), steps_per_dispatch=steps)[0])
        counts.append(tuple(calls))
    assert counts[:3] == [(1,) * 22, (4, 4, 3) * 2, (11, 11)]
    assert counts[3][0] == 1  # the first dispatch measures the time of a step
    assert max(counts[3]) > 1
    for state in states[1:]:
        same(state, states[0])


def test_dispatching_ahead_changes_no_result(tmp_path, monkeypatch):
    plain, _ = run(tmp_path / "plain", steps_per_dispatch=3)
    dispatches = run_module.Training.dispatches

    def dispatch_ahead(self, end):
        self._overlap = True
        return dispatches(self, end)

    monkeypatch.setattr(run_module.Training, "dispatches", dispatch_ahead)
    state, _ = run(tmp_path / "ahead", steps_per_dispatch=3)
    same(state, plain)
    assert read_lines(tmp_path / "ahead") == read_lines(tmp_path / "plain")


def test_streamed_data_gives_bit_identical_results(tmp_path):
    resident, one = run(tmp_path / "resident")
    streamed, other = run(tmp_path / "streamed", max_device_gib=0.0)
    same(resident, streamed)
    assert one["test_loss"] == other["test_loss"]


@pytest.mark.parametrize(
    ("devices", "fields"),
    [
        (1, {"batch_size": 90}),
        (8, {"batch_size": 40}),
        pytest.param(1, {"batch_size": 8}, marks=pytest.mark.slow),
        pytest.param(8, {"batch_size": 8}, marks=pytest.mark.slow),
        (2, {"batch_size": 12, "microbatch_size": 4}),
        (8, {"batch_size": 16, "max_device_gib": 0.0}),
    ],
)
def test_evaluation_is_exact_for_any_batch_size_and_number_of_devices(devices, fields, tmp_path):
    """Against NumPy float64 with the trained parameters."""
    state, summary = run(tmp_path, devices, num_epochs=1, **fields)
    bias, kernel = (np.float64(leaf) for leaf in jax.tree.leaves(state.params))
    logits = ((DATASET.test["image"] / 255 - 0.5) / 0.25).reshape(33, -1) @ kernel + bias
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(33), DATASET.test["label"]]
    np.testing.assert_allclose(summary["test_loss"], loss.mean(), rtol=1e-5)
    assert summary["test_accuracy"] == pytest.approx((logits.argmax(1) == DATASET.test["label"]).mean())


def test_the_validation_split_is_evaluated_too(tmp_path):
    dataset = dataclasses.replace(DATASET, validation=split(2, 20))
    _, summary = run(tmp_path, dataset=dataset)
    assert summary["validation_loss"] != summary["test_loss"]
    assert "validation_accuracy" in summary


@pytest.mark.parametrize("steps_per_dispatch", [1, 5])
def test_a_non_finite_loss_stops_the_run_and_names_the_step(steps_per_dispatch, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"the training loss became (nan|inf) at step 2:") as error:
        run(tmp_path, rate=1e38, steps_per_dispatch=steps_per_dispatch)
    assert error.value.exit_code == 3
    assert [line["step"] for line in read_lines(tmp_path)] == [1]  # the lines before the error stay
    assert not (tmp_path / "summary.json").exists()


def test_evaluation_catches_a_last_update_that_diverges(tmp_path):
    with pytest.raises(NonFiniteLossError, match="test_loss is nan at step 1:"):
        run(tmp_path, rate=1e38, batch_size=90, num_epochs=1)
    assert not (tmp_path / "summary.json").exists()


def test_non_finite_metrics_are_recorded_as_null(tmp_path):
    with writer.Writer(tmp_path, 1, active=True) as record:
        record.resume(0, {})
        record.scalars(1, 1, {"loss": 1.0, "grad_norm": math.inf, "other": math.nan})
    assert read_lines(tmp_path) == [{"step": 1, "epoch": 1, "loss": 1.0, "grad_norm": None, "other": None}]


def test_train_seconds_include_a_pause_of_the_host_only_while_the_device_works(tmp_path, monkeypatch):
    """By a clock that advances one second whenever the metrics of a dispatch are recorded, and else hardly."""
    seconds = 0.0

    def monotonic():
        nonlocal seconds
        seconds += 1e-6
        return seconds

    record = loop.Loop._record

    def slow_record(self, *args):
        nonlocal seconds
        seconds += 1
        record(self, *args)

    monkeypatch.setattr(loop.Loop, "_record", slow_record)
    monkeypatch.setattr(run_module, "time", types.SimpleNamespace(monotonic=monotonic))
    dispatches = run_module.Training.dispatches

    def train_seconds(overlap):
        def overlapping(self, end):
            self._overlap = overlap
            return dispatches(self, end)

        monkeypatch.setattr(run_module.Training, "dispatches", overlapping)
        return run(tmp_path / str(overlap), steps_per_dispatch=1)[1]["train_seconds"]

    assert train_seconds(False) == pytest.approx(0, abs=0.1)
    assert train_seconds(True) == pytest.approx(
        20, abs=0.1
    )  # 22 steps; after the last one of each of the two epochs nothing is in flight


@pytest.mark.parametrize(("every", "drawn"), [(0, [22]), (1, [11, 22]), (2, [22])])
def test_plot_every_epochs(every, drawn, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(writer.Writer, "plot", lambda self, name, draw, step: steps.append((name, step)))
    run(tmp_path, plot_every_epochs=every, plots=True)
    assert steps == [(name, step) for step in drawn for name in ("curves", "confusion", "reliability", "examples")]
