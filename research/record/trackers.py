"""Sends a run's record to trackers: --tracker=wandb,mlflow.

A tracker is a copy of metrics.jsonl: when a run starts or resumes, the tracker is sent the rows that it lacks, so after
a kill nothing is missing and nothing is sent twice. Steps that a run makes again, after it went back to a checkpoint,
are not sent again.
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from research.errors import UserError, brief
from research.paths import check_no_password
from research.record import drawing, storage
from research.record.json_files import read_rows
from research.record.mlflow_client import MlflowClient
from research.record.output import Output
from research.record.storage import is_local
from research.record.wandb_client import WandbClient
from research.record.workdir import read_json

_NAME = "trackers.json"
_SECONDS_BETWEEN_SENDS = 2.0
_MAX_WAIT_SECONDS = 120.0  # at the end of a run, for all trackers together
_MAX_WAIT_SECONDS_AFTER_STOP = 15.0  # the same after a signal or an error: the process may soon be killed
_OPENING = threading.Lock()  # the packages import more of themselves when they start


class Client(Protocol):
    """A tracker's API, called in one thread."""

    def open(self, config: dict[str, Any]) -> tuple[int, str]:
        """Creates the run or opens it again; returns the last step that it has (-1: none), and where the run is."""
        ...

    def scalars(self, rows: list[dict[str, Any]]) -> None:
        """Stores rows of increasing steps; they have no value for NaN and infinities that were in metrics.jsonl."""
        ...

    def image(self, name: str, png: bytes, step: int) -> None:
        """Stores a plot."""
        ...

    def summary(self, summary: dict[str, Any]) -> None:
        """Stores the contents of summary.json."""
        ...

    def close(self, failed: bool) -> None:
        """Returns once everything is stored."""
        ...


# Package to import, and client, by the name of the tracker, which is also that of the extra.
CLIENTS: dict[str, tuple[str, Callable[[Path, str, str], Client]]] = {
    "wandb": ("wandb", WandbClient),
    "mlflow": ("mlflow", MlflowClient),
}


def _read(workdir: Path) -> tuple[str, tuple[str, ...]]:
    """Returns the run's id, or a new one, and the names of its trackers."""
    path = workdir / _NAME
    values = read_json(path)
    if values is None:
        return secrets.token_hex(4), ()
    run_id, names = str(values.get("run_id")), values.get("trackers")
    # Strict, since the id becomes part of the names of folders.
    if not re.fullmatch("[0-9a-f]{8}", run_id) or not isinstance(names, list) or not CLIENTS.keys() >= set(names):
        raise UserError(f"{path} is damaged or of another version: delete it to start new runs in the trackers")
    return run_id, tuple(names)


def parse(text: str | None, workdir: Path) -> tuple[str, ...]:
    """Parses --tracker, a comma-separated list; None: the trackers that the run in `workdir` had before.

    Raises:
      UserError: a tracker is unknown.
    """
    if text is None:
        return _read(workdir)[1]
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in CLIENTS:
            raise UserError(f"--tracker={text}: {name!r} is unknown: use {', '.join(CLIENTS)}, or several with commas")
    return names


def check(names: Sequence[str], workdir: Path) -> None:
    """Raises `UserError` if a tracker's package is not installed, or its address is missing or has a password."""
    for name in names:
        spec = importlib.util.find_spec(CLIENTS[name][0])
        if spec is None or not spec.has_location:  # a folder of the working directory has none
            raise UserError(
                f'--tracker={name} needs its package: pip install -e ".[{name}]" (--tracker= for no tracker)'
            )
    if "mlflow" in names:
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        check_no_password(uri)
        if not uri and not is_local(workdir):
            raise UserError(f"--tracker=mlflow: its local store cannot be in {workdir}: set MLFLOW_TRACKING_URI")


def make(
    names: Sequence[str],
    workdir: Path,
    experiment: str,
    message: Callable[[str], None],
    warning: Callable[[str], None],
) -> "list[Tracker]":
    """Returns the run's trackers, and stores their names and the run's id, which is the same after every resume.

    Args:
      names: of the trackers.
      workdir: an existing folder.
      experiment: the name of the project that the run belongs to.
      message: called with a line about where the run is.
      warning: called with a warning.
    """
    run_id, recorded = _read(workdir)
    if recorded != tuple(names):
        values = {"run_id": run_id, "trackers": list(names)}
        storage.replace(workdir / _NAME, f"{json.dumps(values)}\n".encode())
    # Not in the trackers' threads: threads that import packages with common parts may see half of a module.
    for name in names:
        with contextlib.suppress(Exception):  # which the tracker then warns of
            importlib.import_module(CLIENTS[name][0])
    clients = {name: CLIENTS[name][1](workdir, experiment, run_id) for name in names}
    return [Tracker(name, client, message, warning, share=1 / len(names)) for name, client in clients.items()]


class Tracker(Output):
    """A tracker, fed by a thread, so that training never waits for it. After a failure it warns once and ends.

    Args:
      name: of the tracker.
      client: its API.
      message: called with a line about where the run is.
      warning: called with a warning.
      share: of the seconds that the end of the run waits for trackers.
    """

    can_rewind = False

    def __init__(
        self,
        name: str,
        client: Client,
        message: Callable[[str], None],
        warning: Callable[[str], None],
        share: float = 1.0,
    ):
        self._name, self._client, self._message, self._warning = name, client, message, warning
        self._rows: list[dict[str, Any]] = []  # not yet given to the thread
        # A tracker ignores a row of a step that it has, be it by a plot only: plots wait for the row of their step.
        self._images: list[tuple[str, bytes, int]] = []
        self._last_row = -1  # step of the newest row given to the thread
        self._last_send = 0.0
        self._first_step = self._last_step = -1  # that the tracker has: when it is opened, and now
        self._actions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stored = threading.Event()  # set once the summary is stored, or once the tracker has failed
        self._share, self._wait_seconds = share, share * _MAX_WAIT_SECONDS
        # A daemon, since a tracker that no longer answers must not keep the process from ending. (W&B's own process,
        # which Python waits for, ends by `wandb_client._FINISH_SECONDS`.)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self, config: dict[str, Any], step: int, rows: list[dict[str, Any]]) -> None:
        """Sends the rows that the tracker lacks."""
        if self._thread.ident is None:
            self._thread.start()
            self._put(lambda: self._open(config))
        self._rows, self._images = list(rows), []
        self.sync()

    def scalars(self, row: dict[str, Any]) -> None:
        """Sends a row, together with others if they come fast."""
        self._rows.append(row)
        if self._images or time.monotonic() - self._last_send > _SECONDS_BETWEEN_SENDS:
            self.sync()

    def image(self, name: str, png: bytes, step: int) -> None:
        """Sends a plot, once the row of its step is sent."""
        self._images.append((name, png, step))
        self.sync()

    def summary(self, summary: dict[str, Any]) -> None:
        """Sends the summary, and waits until it is stored: afterwards the run counts as finished."""
        self.sync()
        self._put(lambda: self._client.summary(summary))
        self._put(self._stored.set)
        self._wait(self._stored.wait)

    def sync(self) -> None:
        """Gives all rows to the thread, and the plots of their steps."""
        rows, self._rows, self._last_send = self._rows, [], time.monotonic()
        self._put(lambda: self._send(rows))
        self._last_row = rows[-1]["step"] if rows else self._last_row
        ready = [image for image in self._images if image[2] <= self._last_row]
        self._images = [image for image in self._images if image[2] > self._last_row]
        self._put(lambda: self._send_images(ready))

    def close(self, failed: bool) -> None:
        """Waits until everything is stored."""
        if self._thread.is_alive():
            self.sync()
            self._put(lambda: self._client.close(failed))
            self._put(None)
            if failed:
                self._wait_seconds = min(self._wait_seconds, self._share * _MAX_WAIT_SECONDS_AFTER_STOP)
            self._wait(self._thread.join)
            if self._thread.is_alive():
                self._warning(f"{self._name} has not stored everything yet: not waiting for it any longer")

    def _wait(self, wait: Callable[[float], Any]) -> None:
        start = time.monotonic()
        wait(self._wait_seconds)
        self._wait_seconds = max(0.0, self._wait_seconds - (time.monotonic() - start))

    def _put(self, action: Callable[[], None] | None) -> None:
        if self._thread.is_alive():
            self._actions.put(action)

    def _open(self, config: dict[str, Any]) -> None:
        with _OPENING:
            self._last_step, place = self._client.open(config)
        self._first_step = self._last_step
        self._message(f"{self._name}: {place}")

    def _send(self, rows: list[dict[str, Any]]) -> None:
        new = [row for row in rows if row["step"] > self._last_step]
        if new:
            # None: NaN or infinity, read from metrics.jsonl.
            self._client.scalars([{name: x for name, x in row.items() if x is not None} for row in new])
            self._last_step = new[-1]["step"]

    def _send_images(self, images: list[tuple[str, bytes, int]]) -> None:
        for name, png, step in images:
            if step > self._first_step:
                self._client.image(name, png, step)

    def _work(self) -> None:
        """Calls the actions in turn, until one fails."""
        while (action := self._actions.get()) is not None:
            try:
                action()
            except Exception as error:
                reason = brief(error) or type(error).__name__
                self._warning(f"{self._name} no longer receives this run ({reason}): resuming it sends what is missing")
                self._stored.set()
                return


def replay(names: Sequence[str], workdir: Path, experiment: str) -> None:
    """Makes these the trackers of a finished run, and sends them what they lack of its record.

    Raises:
      UserError: a file of the record is damaged.
    """
    config, summary = (read_json(workdir / f"{name}.json") or {} for name in ("config", "summary"))
    rows, _ = read_rows(workdir, summary["num_train_steps"] + 1)
    outputs = make(names, workdir, experiment, print, drawing.print_warning)
    for output in outputs:
        output.start(config, summary["num_train_steps"] + 1, rows)
        for path in sorted(workdir.glob("*.png")):
            output.image(path.stem, path.read_bytes(), summary["num_train_steps"])
    for output in outputs:
        output.summary(summary)
    for output in outputs:
        output.close(failed=False)
