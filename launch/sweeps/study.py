"""The study that the workers of a sweep share, in one of Optuna's storages: which trials there are, who runs them.

All trials are planned at the beginning, so that any number of workers make exactly that many. A worker claims one, and
says every few seconds that it is alive; the trials of one that is not are planned once more.
"""

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from research.errors import UserError

_BEAT_SECONDS = 5.0
_SECONDS_TO_MAKE_TABLES = 1.0
_LOST_SECONDS = 60.0  # without a sign of life; on this host a process that is gone is known to be
_RUNNING, _WAITING = (TrialState.RUNNING,), (TrialState.WAITING,)
RETRY_OF, REASON, WORKER, DIVERGED_AT, _PLANNED = "retry_of", "reason", "worker", "diverged_at", "planned"
LOST = "its worker was lost"


def open_storage(text: str, workdir: Path) -> optuna.storages.BaseStorage:
    """The storage of a URL, or of a journal file; "": the journal in the workdir.

    Raises:
      UserError: it cannot be reached.
    """
    path = Path(text) if text else workdir / "journal.log"
    try:
        if "://" in text:
            return _database(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock is a link to the path. Were that relative, it would lead nowhere, and Optuna would wait for ever
        # where a worker was killed with the lock.
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path.absolute())))
        storage.get_all_studies()  # a journal is not read before
        return storage
    except Exception as error:  # each database driver raises its own
        raise _unreachable(text or str(path), error) from None


def _database(url: str) -> optuna.storages.BaseStorage:
    try:
        return optuna.storages.get_storage(url)
    except Exception:  # another worker may have made the same tables at the same time
        time.sleep(_SECONDS_TO_MAKE_TABLES)
        return optuna.storages.get_storage(url)


def _unreachable(text: str, error: Exception) -> UserError:
    shown = re.sub(r"//[^@/]*@", "//***@", text)  # a password may be in it
    why = " ".join(str(error).split())[:200]
    return UserError(f"--storage={shown} cannot be reached: {why}; give another, or none: journal.log in --workdir")


def differing(identity: dict[str, Any], known: dict[str, Any]) -> str:
    """The names of what differs from what is known of a study; "": it is the same sweep."""
    return ", ".join(key for key in identity if identity[key] != known.get(key))


class Study:
    """The trials of one sweep.

    Args:
      storage: where they are.
      name: of the study.
      direction: "maximize" or "minimize".
      identity: what the sweep is, as it is read from JSON; a study belongs to one.
      sampler, pruner: as in `launch.sweep.SweepOptions`.
      seed: of the sampler.

    Raises:
      UserError: the study is of another sweep.
    """

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        direction: Literal["maximize", "minimize"],
        identity: dict[str, Any],
        sampler: str,
        pruner: str,
        seed: int,
    ):
        self._sampler, self._seed = sampler, seed
        # A container's process has the same number each time it is started, and mostly the same host's name.
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._storage = storage
        self.identity = identity
        try:
            self.optuna = optuna.create_study(
                storage=storage, study_name=name, direction=direction, pruner=_pruner(pruner), load_if_exists=True
            )
        except Exception as error:  # each database driver raises its own
            raise _unreachable("...", error) from None
        known = self.optuna.user_attrs.get("identity", {})
        if not known and not self.trials():
            self.optuna.set_user_attr("identity", identity)
        elif found := differing(identity, known):
            raise UserError(
                f"--study={name} of that storage is another sweep ({found} differs): give another --workdir, "
                "and --study where --storage is shared, or the flags that it was begun with"
            )

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in these states; what was lost and planned once more counts once."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def _planned(self) -> dict[int, FrozenTrial]:
        """The trials that are to be, retries not counted, by their place in the plan.

        Workers that start together plan the same places: the first trial of each is the one that counts.
        """
        planned: dict[int, FrozenTrial] = {}
        for trial in self.trials():
            if RETRY_OF not in trial.user_attrs:
                planned.setdefault(trial.user_attrs.get(_PLANNED, trial.number), trial)
        return planned

    def planned(self) -> int:
        """How many trials there are to be, retries not counted."""
        return len(self._planned())

    def complete(self, count: int) -> bool:
        """Whether `count` trials were planned and none is left to end."""
        return self.planned() >= count and not self.trials(*_RUNNING) and not self._left(count)

    def others_run(self) -> bool:
        """Whether trials of other workers, which may be lost yet, are not at their end."""
        return bool(self.trials(*_RUNNING))

    def _left(self, count: int) -> list[FrozenTrial]:
        """The waiting ones of the first `count` planned trials, and of retries."""
        planned = {trial.number for place, trial in self._planned().items() if place < count}
        return [t for t in self.trials(*_WAITING) if RETRY_OF in t.user_attrs or t.number in planned]

    def plan(self, count: int, points: Sequence[dict[str, Any]]) -> None:
        """Plans trials up to `count`; of a grid, these points."""
        for number in range(self.planned(), count):
            self.optuna.enqueue_trial(points[number] if points else {}, user_attrs={_PLANNED: number})

    def claim(self, count: int) -> optuna.Trial | None:
        """The next of the first `count` planned trials, now this worker's; None: there is none."""
        for waiting in self._left(count):
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                # As in `Study.ask`, which would make a new trial where there is none.
                if self._storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                    self._storage.set_trial_user_attr(waiting._trial_id, WORKER, self._worker)
                    self.optuna.sampler = _make_sampler(self._sampler, self._seed, waiting.number)
                    return optuna.Trial(self.optuna, waiting._trial_id)
        return None

    def finish(self, trial: optuna.Trial, value: float | None, state: TrialState, **attributes: Any) -> None:
        """Ends a trial; a worker that was taken for dead is too late."""
        for name, attribute in attributes.items():
            trial.set_user_attr(name, attribute)
        self.optuna.tell(trial, value, state, skip_if_finished=True)

    def retry(self, trial: FrozenTrial | optuna.Trial, reason: str) -> None:
        """Fails a trial that did not end by itself, and plans it once more with the same values."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial._trial_id, REASON, reason)
            if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                lost = self._storage.get_trial(trial._trial_id)  # perhaps before it was told its values
                values = lost.system_attrs.get("fixed_params", {}) | lost.params
                self.optuna.enqueue_trial(values, user_attrs={RETRY_OF: trial.number})

    def retry_lost(self) -> int:
        """Plans once more the trials of workers that are no more, but no retry; returns how many were lost."""
        lost = [trial for trial in self.trials(*_RUNNING) if self._is_lost(trial)]
        for trial in lost:
            if RETRY_OF not in trial.user_attrs:
                self.retry(trial, LOST)
                continue
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(trial._trial_id, REASON, f"{LOST}, twice")
                self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
        return len(lost)

    def _is_lost(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER, "")
        if worker == self._worker:
            return False
        host, number, *_ = *worker.split(":"), ""
        if host == socket.gethostname() and not Path(f"/proc/{number}").exists():
            return True
        began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - (self.last_seen(trial) or began) > _LOST_SECONDS

    def last_seen(self, trial: FrozenTrial) -> float | None:
        """When the worker of a trial last said that it was alive, in seconds since 1970."""
        return self.optuna.user_attrs.get(f"alive:{trial.user_attrs.get(WORKER)}")

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Within it this worker says that it is alive."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_BEAT_SECONDS):
                with contextlib.suppress(Exception):  # the storage may be away for a moment
                    self.optuna.set_user_attr(f"alive:{self._worker}", time.time())

        self.optuna.set_user_attr(f"alive:{self._worker}", time.time())
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def add_compilations(self, count: int) -> None:
        """Notes how often this worker compiled a train program."""
        self.optuna.set_user_attr(f"compilations:{self._worker}", count)

    def num_compilations(self) -> int:
        """Of all workers."""
        return sum(n for name, n in self.optuna.user_attrs.items() if name.startswith("compilations:"))


def _make_sampler(name: str, seed: int, number: int) -> optuna.samplers.BaseSampler:
    # Made for each trial: the draws follow from the trial's number, whichever worker makes it.
    own = (seed * 1_000_003 + number) % 2**32
    match name:
        case "tpe":
            return optuna.samplers.TPESampler(seed=own, constant_liar=True)
        case "halton":
            return optuna.samplers.QMCSampler(
                qmc_type="halton",
                scramble=True,
                seed=seed,
                warn_independent_sampling=False,
                warn_asynchronous_seeding=False,
            )
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=own, warn_independent_sampling=False)
        case _:  # the points of a grid are planned
            return optuna.samplers.RandomSampler(seed=own)


def _pruner(name: str) -> optuna.pruners.BasePruner:
    match name:
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case "median":
            return optuna.pruners.MedianPruner()
        case _:
            return optuna.pruners.NopPruner()
