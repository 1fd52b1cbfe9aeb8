"""`launch.sweep`: trials are planned once, lost ones come again, the record is left."""

import dataclasses
import os
import signal
import time
from types import SimpleNamespace

import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from optuna.trial import TrialState  # noqa: E402

from experiments import cifar_cnn  # noqa: E402
from launch import sweep  # noqa: E402
from launch.sweeps import report, search_space, worker  # noqa: E402
from launch.sweeps.trials import Study, open_storage  # noqa: E402
from research.errors import NonFiniteLossError, OutOfMemoryError, UserError  # noqa: E402
from research.process.signals import Signals, StoppedError  # noqa: E402
from research.tasks.task import Task  # noqa: E402
from research.training import hyperparams  # noqa: E402
from research.training.population import Report  # noqa: E402

RATE = "optimizer.learning_rate"
CHOICES = {field.name: field.metadata["choices"] for field in dataclasses.fields(sweep.SweepOptions)}


class _Fake:
    """In the place of a population: the figure of a config is a function of its epoch, rate and seed."""

    made = []  # noqa: RUF012

    def __init__(self, config, task, dataset, devices, size, share_data_with=None):
        self.signature, self.members, self.size, self.most = hyperparams.signature(config), {}, size, 0
        self.num_compilations = 0
        _Fake.made.append(self)

    @property
    def free(self):
        return [slot for slot in range(self.size) if slot not in self.members]

    def start(self, slot, config):
        assert hyperparams.signature(config) == self.signature
        self.members[slot] = [config, 0]
        self.most = max(self.most, len(self.members))

    def stop(self, slot):
        del self.members[slot]

    def train_epoch(self, stops):
        if stops():
            return {}
        self.num_compilations, reports = 1, {}
        for slot, member in self.members.items():
            config, member[1] = member[0], member[1] + 1
            diverges = config.optimizer.learning_rate > 1
            value = config.optimizer.learning_rate * member[1] + config.seed
            figures = {} if diverges else {"validation_accuracy": value, "validation_loss": -value}
            finished = diverges or member[1] == config.num_epochs
            reports[slot] = Report(member[1], figures, 3 if diverges else None, finished)
        return reports


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`fake(*search, ...)` makes a sweep whose trials take no time: (sweep, study, a function that makes a worker)."""
    monkeypatch.setattr(worker, "Population", _Fake)
    monkeypatch.setattr(worker, "load", lambda *_: SimpleNamespace(name="drawn"))
    _Fake.made = []
    experiment = dataclasses.replace(
        cifar_cnn.EXPERIMENT, make_task=lambda *_: Task(), complete=lambda config, _: config
    )

    def make(*texts, trials=12, seeds=1, size=4, sampler="random", pruner="none", epochs=3, signals=None):
        config = cifar_cnn.get_config()
        config.num_epochs = epochs
        space = search_space.parse(texts, config)
        points = space.grid() if sampler == "grid" else []
        trials = len(points) or trials
        swept = worker.Sweep(experiment, config, space, "validation_accuracy", trials, seeds, size, [None])
        study = Study(open_storage("", tmp_path), "s", "maximize", {"search": texts}, sampler, pruner, 0)
        study.plan(trials, points)
        return swept, study, worker.Worker(swept, study, signals or Signals(), lambda: None)

    return make


@pytest.mark.parametrize("sampler", CHOICES["sampler"])
def test_every_sampler_makes_exactly_the_planned_trials(fake, sampler):
    grid = ["optimizer.name=[sgd,momentum]", f"{RATE}=[0.1,0.2,0.3]"]
    texts = grid if sampler == "grid" else [f"{RATE}=log(1e-3,1)", "label_smoothing=float(0.1,0.2)"]
    swept, study, made = fake(*texts, sampler=sampler)
    made.run()
    trials = study.trials(TrialState.COMPLETE)
    assert len(trials) == (6 if sampler == "grid" else 12)
    assert len({tuple(trial.params.items()) for trial in trials}) == len(trials)
    assert study.complete(swept.trials)
    assert report.best(study, swept)[0].params[RATE] == max(trial.params[RATE] for trial in trials)


def test_trials_of_one_program_share_it_and_fill_its_slots(fake):
    _, study, made = fake("model.width=[4,8]", "optimizer.name=[sgd,adam]", f"{RATE}=[0.1,0.2,0.3,0.4]", sampler="grid")
    made.run()
    assert len(study.trials(TrialState.COMPLETE)) == 16
    assert len(_Fake.made) == len({fake.signature for fake in _Fake.made}) == 4
    assert study.num_compilations() == 4
    assert {fake.most for fake in _Fake.made} == {4}


def test_seeds_count_by_their_mean(fake):
    swept, study, made = fake(f"{RATE}=[0.1,0.2]", sampler="grid", seeds=3, size=7)
    made.run()
    assert [trial.value for trial in study.trials()] == pytest.approx([0.3 + 1, 0.6 + 1])
    assert study.trials()[0].user_attrs["seed_values"] == pytest.approx([0.3, 1.3, 2.3])
    assert _Fake.made[0].most == 6
    commands = report.commands("experiments.cifar_cnn", ["--config=tutorial"], swept, {RATE: 0.2})
    assert [command[-1] for command in commands] == [f"--config.seed={seed}" for seed in range(3)]


@pytest.mark.parametrize("pruner", CHOICES["pruner"])
def test_pruners_end_the_worst_early(fake, pruner):
    swept, study, made = fake(f"{RATE}=float(0.01,1)", trials=30, epochs=9, pruner=pruner)
    made.run()
    pruned = study.trials(TrialState.PRUNED)
    assert (len(pruned) > 3) == (pruner != "none")
    assert report.summary(study, swept)["num_pruned"] == len(pruned)
    assert len(pruned) + len(study.trials(TrialState.COMPLETE)) == 30


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(fake):
    """Of 8 trials 2 diverge, and 2 give SGD a momentum that it does not have."""
    texts = ["optimizer.name=[sgd,nesterov]", f"{RATE}=[0.1,9]", "optimizer.momentum=[0.5,0.9]"]
    swept, study, made = fake(*texts, sampler="grid")
    made.run()
    found = report.summary(study, swept)
    assert (found["num_trials"], found["num_complete"], found["num_failed"]) == (8, 2, 6)
    diverged = [trial for trial in study.trials() if trial.user_attrs.get("diverged_at") == 3]
    assert [trial.state for trial in diverged] == [TrialState.PRUNED] * 2
    assert all("sgd has none" in trial.user_attrs["reason"] for trial in study.trials(TrialState.FAIL))


def test_ten_failures_in_a_row_end_the_sweep(fake):
    _, study, made = fake(f"{RATE}=float(2,9)", trials=40)
    with pytest.raises(NonFiniteLossError, match="12 trials in a row failed") as error:
        made.run()
    assert "step 3" in str(error.value)
    assert len(study.trials(TrialState.PRUNED)) == 12  # three populations of four


def test_failures_beside_trials_that_train_do_not_end_the_sweep(fake):
    rates = [0.01 * n for n in range(1, 23)] + [float(n) for n in range(2, 12)]
    _, study, made = fake(f"{RATE}={rates}", sampler="grid", size=32)
    made.run()
    assert len(study.trials(TrialState.COMPLETE)) == 22
    assert len(study.trials(TrialState.PRUNED)) == 10


def test_trials_that_all_fail_one_after_the_other_end_the_sweep(fake, monkeypatch):
    """Each diverges in its second epoch, and they began at different times: there is always one that still trains."""
    train_epoch = _Fake.train_epoch

    def staggered(self, stops):
        reports = train_epoch(self, stops)
        self.epochs = getattr(self, "epochs", 0) + 1
        for slot, (_, epoch) in self.members.items():
            if epoch == 2 or (self.epochs == 1 and slot % 2):
                reports[slot] = Report(epoch, {}, 3, True)
        return reports

    monkeypatch.setattr(_Fake, "train_epoch", staggered)
    _, study, made = fake(f"{RATE}=float(0.1,1)", trials=60)
    with pytest.raises(NonFiniteLossError, match="trials in a row failed"):
        made.run()
    assert 18 <= len(study.trials(TrialState.PRUNED)) < 30


def test_a_trial_that_there_was_no_memory_to_start_is_planned_once_more(fake, monkeypatch):
    _, study, made = fake(f"{RATE}=float(0.1,1)", trials=4)
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")
    monkeypatch.setattr(_Fake, "start", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(OutOfMemoryError):
        made.run()
    assert len(study.trials(TrialState.WAITING)) == 4


def test_only_the_newest_programs_are_kept(fake, monkeypatch):
    loads, load = [], worker.load
    monkeypatch.setattr(worker, "load", lambda *args: loads.append(args[1].train_fraction) or load(*args))
    widths = [8 * n for n in range(1, 21)]
    _, study, made = fake(f"model.width={widths}", "dataset.train_fraction=[0.5,1]", sampler="grid")
    made.run()
    assert sorted(loads) == [0.5, 1]
    assert {len(populations) for _, populations in made._loaded.values()} == {16}
    assert study.num_compilations() == 40


def test_only_the_newest_data_sets_are_kept(fake):
    _, study, made = fake("dataset.train_fraction=[0.1,0.2,0.3,0.4,0.5,0.6,0.7]", sampler="grid")
    made.run()
    assert len(made._loaded) == 4
    assert len(study.trials(TrialState.COMPLETE)) == 7


def test_out_of_memory_says_how_to_go_on_and_gives_back_what_was_running(fake, monkeypatch):
    _, study, made = fake(f"{RATE}=float(0.1,1)", trials=4)
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")
    monkeypatch.setattr(_Fake, "train_epoch", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(OutOfMemoryError, match=r"allocating 8 bytes.*give --population=2 to continue"):
        made.run()
    assert len(study.trials(TrialState.WAITING)) == 4


def test_a_signal_gives_back_what_was_running(fake):
    signals = Signals()
    swept, study, made = fake(f"{RATE}=float(0.1,1)", trials=6, signals=signals)
    signals.received = signal.SIGINT
    with pytest.raises(StoppedError, match="the same command resumes"):
        made.run()
    assert study.trials(TrialState.RUNNING) == []
    again = worker.Worker(swept, study, Signals(), lambda: None)
    again.run()
    assert len(study.trials(TrialState.COMPLETE)) == 6
    assert report.summary(study, swept)["num_trials"] == 6


def test_two_workers_share_no_trial_and_a_lost_one_is_retried_once(fake, tmp_path):
    swept, study, _ = fake(f"{RATE}=float(0.1,1)", trials=7)
    other = Study(open_storage("", tmp_path), "s", "maximize", {"search": [f"{RATE}=float(0.1,1)"]}, "tpe", "none", 0)
    claimed = [(study, other)[turn % 2].claim(7) for turn in range(9)]
    assert [trial and trial.number for trial in claimed] == [*range(7), None, None]
    first = claimed[0]
    rate = swept.space.suggest(first)[RATE]
    assert study.retry_lost() == 0
    for expected in (1, 0):  # lost, retried; lost again, not retried
        first.set_user_attr("worker", f"{os.uname().nodename}:{2**22 + 1}")  # no such process
        assert other.retry_lost() == 1
        first = study.claim(7)
        assert bool(first) == bool(expected)
        assert not first or (first.number, swept.space.suggest(first)[RATE]) == (7, rate)
    assert report.summary(study, swept)["num_failed"] == 1


def test_a_worker_elsewhere_is_lost_when_it_has_been_silent_for_long(fake, monkeypatch):
    _, study, _ = fake(f"{RATE}=float(0.1,1)", trials=2)
    trial = study.claim(2)
    trial.set_user_attr("worker", "elsewhere:1")
    study.optuna.set_user_attr("alive:elsewhere:1", time.time() - 30)
    assert study.retry_lost() == 0
    study.optuna.set_user_attr("alive:elsewhere:1", time.time() - 90)
    assert study.retry_lost() == 1


def test_a_worker_with_the_host_and_number_of_a_lost_one_is_another(fake, tmp_path):
    """As a container that is started again: process 1 of the same host."""
    _, study, _ = fake(f"{RATE}=float(0.1,1)", trials=2)
    trial = study.claim(2)
    worker = next(t.user_attrs["worker"] for t in study.trials() if t.number == trial.number)
    study.optuna.set_user_attr(f"alive:{worker}", time.time() - 90)
    again = Study(open_storage("", tmp_path), "s", "maximize", {"search": [f"{RATE}=float(0.1,1)"]}, "tpe", "none", 0)
    with again.alive():
        assert again.retry_lost() == 1


def test_a_study_of_another_search_is_refused(fake, tmp_path):
    fake(f"{RATE}=float(0.1,1)")
    with pytest.raises(UserError, match="is another sweep \\(search differs\\)"):
        Study(open_storage("", tmp_path), "s", "maximize", {"search": []}, "tpe", "none", 0)
