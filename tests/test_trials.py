"""`launch.sweeps.trials`: every planned trial is trained once, whichever worker planned it and whichever was lost."""

import os
from datetime import timedelta

import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from optuna.trial import TrialState  # noqa: E402

from launch.sweeps import report  # noqa: E402
from launch.sweeps import trials as trials_lib  # noqa: E402
from launch.sweeps.trials import WORKER, Study, open_storage  # noqa: E402

GRID = [{"x": 0.1}, {"x": 0.2}, {"x": 0.3}]


@pytest.fixture
def make(tmp_path):
    return lambda: Study(open_storage("", tmp_path), "s", "maximize", {}, "grid", "none", 0)


def _train(study):
    """Claims what there is, as a worker does; the values of x."""
    values = []
    while (trial := study.claim(3)) is not None:
        values.append(trial.suggest_float("x", 0, 1))
        study.finish(trial, values[-1], TrialState.COMPLETE)
    return values


def test_workers_that_plan_at_once_train_each_point_once(make, monkeypatch):
    workers = make(), make()
    with monkeypatch.context() as patch:
        patch.setattr(Study, "planned", lambda _: 0)  # neither has seen the other's
        for worker in workers:
            worker.plan(3, GRID)
    assert {worker.planned() for worker in workers} == {3}
    assert _train(workers[1]) + _train(workers[0]) == [0.1, 0.2, 0.3]
    assert workers[0].complete(3)


def _lose(trial):
    trial.set_user_attr(WORKER, f"{os.uname().nodename}:{2**22 + 1}")  # no such process


def test_a_point_whose_worker_died_before_it_was_read_comes_again(make):
    study = make()
    study.plan(3, GRID)
    _lose(study.claim(3))
    assert study.retry_lost() == 1
    assert sorted(_train(study)) == [0.1, 0.2, 0.3]


def test_a_retried_trial_counts_once(make):
    study = make()
    study.plan(3, GRID)
    _lose(study.claim(3))
    study.retry_lost()
    assert [trial.number for trial in study.trials()] == [1, 2, 3]  # 3 is the retry of 0
    assert study.trials(TrialState.FAIL) == []
    assert [trial.number for trial in study.attempts(TrialState.FAIL)] == [0]
    _train(study)
    assert sorted(trial.value for trial in study.trials()) == [0.1, 0.2, 0.3]
    assert len(study.attempts()) == 4
    assert (study.planned(), study.complete(3)) == (3, True)


def test_time_in_which_nothing_ran_does_not_count(make):
    study = make()
    study.plan(1, [])
    trial = study.claim(1)
    _lose(trial)
    began = trial.datetime_start.timestamp()
    study.optuna.set_user_attr(f"alive:{trial.user_attrs[WORKER]}", began + 20)
    assert study.retry_lost() == 1
    (ended,) = study.attempts(TrialState.FAIL)
    ended.datetime_complete = ended.datetime_start + timedelta(seconds=90)  # when it was found
    assert report._busy_seconds(study) == pytest.approx(20, abs=0.1)


def test_a_database_whose_tables_another_worker_makes_is_opened_again(monkeypatch, tmp_path):
    made, url = [], f"sqlite:///{tmp_path}/x.db"
    get_storage = optuna.storages.get_storage

    def first_fails(text):
        made.append(text)
        if len(made) == 1:
            raise RuntimeError("UNIQUE constraint failed: alembic_version")
        return get_storage(text)

    monkeypatch.setattr(optuna.storages, "get_storage", first_fails)
    monkeypatch.setattr(trials_lib, "_SECONDS_TO_CREATE_TABLES", 0)
    assert open_storage(url, tmp_path).get_all_studies() == []
    assert made == [url, url]
