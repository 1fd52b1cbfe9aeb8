"""Ctrl-C and a closed terminal: a checkpoint after the current dispatch, the exit code, no traceback.

SIGTERM is tested in test_resume.py, several processes in test_distributed.py.
"""

import dataclasses
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import linear
import pytest
from command import DIGITS

from research import app
from research.process.signals import Signals

pytestmark = pytest.mark.faults

ARGS = [*DIGITS, "--config.num_epochs=10000", "--config.log_every_steps=1", "--config.steps_per_dispatch=2"]


def _stopped_in_time(workdir, text, name):
    """Asserts that the run stopped after the current dispatch, with a checkpoint of its last step."""
    (step,) = re.findall(rf"error: stopped by {name} at step (\d+) with a checkpoint", text)
    assert (workdir / "checkpoints" / step).is_dir()
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) in (int(step), int(step) - 1)
    assert "Traceback" not in text
    assert not (workdir / "summary.json").exists()


def test_ctrl_c(forks, tmp_path):
    args = [*ARGS, f"--workdir={tmp_path / 'x'}"]
    ended = forks.run("linear", args, send=[signal.SIGINT, tmp_path / "x/checkpoints/14"])
    assert ended.code == 130, ended.output
    _stopped_in_time(tmp_path / "x", ended.output, "SIGINT")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_before_training_it_stops_at_once(name, code, forks, tmp_path):
    send = [getattr(signal, name), tmp_path / "x/.lock"]
    ended = forks.run("linear", [*ARGS, f"--workdir={tmp_path / 'x'}"], send=send)
    assert ended.code == code, ended.output
    assert ended.output.splitlines()[-1] == f"error: stopped by {name}"


# Makes stdin the controlling terminal, then runs its arguments. `pty.fork` would fork the tests' multithreaded process.
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under `nohup pytest`
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_closed_terminal_stops_the_run_with_a_checkpoint(env, tmp_path):
    """With a real terminal: the kernel sends SIGHUP, and printing fails from then on."""
    terminal, slave = pty.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, sys.executable, "-m", "linear", *ARGS, "--workdir=x"]
    process = subprocess.Popen(command, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    deadline = time.monotonic() + 240
    while not (tmp_path / "x/checkpoints/14").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    assert process.wait(timeout=240) == 129
    steps = [int(path.name) for path in (tmp_path / "x/checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) == len((tmp_path / "x/metrics.jsonl").read_text().splitlines())


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().handled():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_it_runs_without_handlers():
    """As from a notebook's or a server's thread, where Python refuses to install them."""
    before = signal.getsignal(signal.SIGTERM)

    def run(_, argv, signals):
        with signals.deferred():
            handlers.append(signal.getsignal(signal.SIGTERM))

    experiment = dataclasses.replace(linear.EXPERIMENT, run=run)
    handlers = []
    thread = threading.Thread(target=app.main, args=(experiment, []))
    thread.start()
    thread.join()
    assert handlers == [before]
