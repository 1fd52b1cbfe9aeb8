"""The trials of a sweep, in an Optuna storage that all of its workers share.

All trials are planned at the start, so that any number of workers train exactly that many. A worker claims a trial and
writes a heartbeat every few seconds. The trials of a worker whose heartbeat stops are retried once.
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

from research.errors import UserError, brief

_HEARTBEAT_SECONDS = 5.0
_SECONDS_TO_CREATE_TABLES = 1.0
_LOST_SECONDS = 60.0  # without a heartbeat; on the same host a process that has ended is noticed at once
_RUNNING, _WAITING = (TrialState.RUNNING,), (TrialState.WAITING,)
RETRY_OF, REASON, WORKER, DIVERGED_AT, _PLANNED = "retry_of", "reason", "worker", "diverged_at", "planned"
LOST = "its worker was lost"


def open_storage(text: str, workdir: Path) -> optuna.storages.BaseStorage:
    """Opens the storage at a URL, or a journal file; "" is journal.log in the workdir.

    Raises:
      UserError: it cannot be reached.
    """
    path = Path(os.path.expanduser(text)) if text else workdir / "journal.log"
    try:
        if "://" in text:
            return _database(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Optuna's lock is a symbolic link to this path. A relative one would dangle, and Optuna would wait forever
        # after a worker was killed while it held the lock.
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path.absolute())))
        storage.get_all_studies()  # reads the journal, so that a damaged one is noticed here
        return storage
    except Exception as error:  # every database driver raises different exceptions
        raise _unreachable(text or str(path), error) from None


def _database(url: str) -> optuna.storages.BaseStorage:
    try:
        return optuna.storages.get_storage(url)
    except Exception:  # another worker may have created the same tables at the same time
        time.sleep(_SECONDS_TO_CREATE_TABLES)
        return optuna.storages.get_storage(url)


def _unreachable(text: str, error: Exception) -> UserError:
    shown = re.sub(r"//[^@/]*@", "//***@", text)  # it may contain a password
    why = brief(error)
    return UserError(
        f"--storage={shown} cannot be reached: {why}; give another one, or leave it out to use journal.log in --workdir"
    )


def differing(identity: dict[str, Any], known: dict[str, Any]) -> str:
    """The names of the settings that differ from those that a study was started with; "": it is the same sweep."""
    return ", ".join(key for key in identity if identity[key] != known.get(key))


class Study:
    """The trials of one sweep.

    Args:
      storage: holds the trials.
      name: the study's name in the storage.
      direction: "maximize" or "minimize".
      identity: the settings that all workers of the study must share, as JSON values.
      sampler, pruner: as in `SweepOptions`.
      seed: the sampler's seed.

    Raises:
      UserError: the study belongs to a sweep with other settings.
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
        # The random part: a restarted container often has the same host name and process id.
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._storage = storage
        self.identity = identity
        try:
            self.optuna = optuna.create_study(
                storage=storage, study_name=name, direction=direction, pruner=_pruner(pruner), load_if_exists=True
            )
        except Exception as error:  # every database driver raises different exceptions
            raise _unreachable("...", error) from None
        known = self.optuna.user_attrs.get("identity", {})
        if not known and not self.attempts():
            self.optuna.set_user_attr("identity", identity)
        elif found := differing(identity, known):
            raise UserError(
                f"--study={name} in that storage is another sweep ({found} differs): give another --workdir, "
                "and --study where --storage is shared, or the flags that it was started with"
            )

    def attempts(self, *states: TrialState) -> list[FrozenTrial]:
        """Everything in the storage, or what is in these states: a retried trial and its retry are two attempts."""
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in these states, each once: a retried trial is represented by its retry."""
        retried = {trial.user_attrs[RETRY_OF] for trial in self.attempts() if RETRY_OF in trial.user_attrs}
        return [trial for trial in self.attempts(*states) if trial.number not in retried]

    def _planned(self) -> dict[int, FrozenTrial]:
        """The planned trials by their place in the plan, retries not counted.

        Workers that start at the same time may plan the same places: the first trial of each place counts.
        """
        planned: dict[int, FrozenTrial] = {}
        for trial in self.attempts():
            if RETRY_OF not in trial.user_attrs:
                planned.setdefault(trial.user_attrs.get(_PLANNED, trial.number), trial)
        return planned

    def planned(self) -> int:
        """The number of planned trials, retries not counted."""
        return len(self._planned())

    def complete(self, count: int) -> bool:
        """Returns whether `count` trials were planned and all of them have ended."""
        return self.planned() >= count and not self.attempts(*_RUNNING) and not self._left(count)

    def others_run(self) -> bool:
        """Returns whether other workers still train trials (and may still be lost)."""
        return bool(self.attempts(*_RUNNING))

    def _left(self, count: int) -> list[FrozenTrial]:
        """The trials that wait to be claimed, among the first `count` planned ones and the retries."""
        planned = {trial.number for place, trial in self._planned().items() if place < count}
        return [t for t in self.attempts(*_WAITING) if RETRY_OF in t.user_attrs or t.number in planned]

    def plan(self, count: int, points: Sequence[dict[str, Any]]) -> None:
        """Plans trials up to `count`; for a grid, with these points."""
        for number in range(self.planned(), count):
            self.optuna.enqueue_trial(points[number] if points else {}, user_attrs={_PLANNED: number})

    def claim(self, count: int) -> optuna.Trial | None:
        """Claims the next of the first `count` planned trials for this worker; None if none is left."""
        for waiting in self._left(count):
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                # What `optuna.Study.ask` does, except that it would create a trial where none waits.
                if self._storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                    self._storage.set_trial_user_attr(waiting._trial_id, WORKER, self._worker)
                    self.optuna.sampler = _make_sampler(self._sampler, self._seed, waiting.number)
                    return optuna.Trial(self.optuna, waiting._trial_id)
        return None

    def finish(self, trial: optuna.Trial, value: float | None, state: TrialState, **attributes: Any) -> None:
        """Ends a trial. Without effect if the trial was taken from this worker because its heartbeat stopped."""
        for name, attribute in attributes.items():
            trial.set_user_attr(name, attribute)
        self.optuna.tell(trial, value, state, skip_if_finished=True)

    def retry(self, trial: FrozenTrial | optuna.Trial, reason: str) -> None:
        """Fails a trial that was interrupted, and plans its retry with the same values."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial._trial_id, REASON, reason)
            if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                lost = self._storage.get_trial(trial._trial_id)  # it may have been lost before it received its values
                values = lost.system_attrs.get("fixed_params", {}) | lost.params
                self.optuna.enqueue_trial(values, user_attrs={RETRY_OF: trial.number})

    def retry_lost(self) -> int:
        """Retries the trials of lost workers, each once; returns how many were lost."""
        lost = [trial for trial in self.attempts(*_RUNNING) if self._is_lost(trial)]
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
        """The last heartbeat of a trial's worker, in seconds since the epoch."""
        return self.optuna.user_attrs.get(f"alive:{trial.user_attrs.get(WORKER)}")

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """A context in which this worker writes heartbeats."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_HEARTBEAT_SECONDS):
                with contextlib.suppress(Exception):  # the storage may be unreachable for a moment
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
        """Records how many train programs this worker has compiled."""
        self.optuna.set_user_attr(f"compilations:{self._worker}", count)

    def num_compilations(self) -> int:
        """The number of train programs that all workers have compiled."""
        return sum(n for name, n in self.optuna.user_attrs.items() if name.startswith("compilations:"))


def _make_sampler(name: str, seed: int, number: int) -> optuna.samplers.BaseSampler:
    # One sampler per trial, seeded by its number: the draws do not depend on which worker makes them.
    trial_seed = (seed * 1_000_003 + number) % 2**32
    match name:
        case "tpe":
            return optuna.samplers.TPESampler(seed=trial_seed, constant_liar=True)
        case "halton":
            return optuna.samplers.QMCSampler(
                qmc_type="halton",
                scramble=True,
                seed=seed,
                warn_independent_sampling=False,
                warn_asynchronous_seeding=False,
            )
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=trial_seed, warn_independent_sampling=False)
        case _:  # a grid: its points were planned already
            return optuna.samplers.RandomSampler(seed=trial_seed)


def _pruner(name: str) -> optuna.pruners.BasePruner:
    match name:
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case "median":
            return optuna.pruners.MedianPruner()
        case _:
            return optuna.pruners.NopPruner()
