"""Ctrl-C, and a terminal that is closed: a checkpoint within a dispatch, the exit code, no traceback.

SIGTERM is in test_resume.py, several processes in test_distributed.py.
"""

import os
import pty
import re
import signal
import time

import pytest
from command import COMMAND, DIGITS

from research.process.signals import Signals

pytestmark = pytest.mark.faults

ARGS = [*DIGITS, "--config.num_epochs=10000", "--config.log_every_steps=1", "--config.steps_per_dispatch=2"]


def _stopped_in_time(workdir, text, name):
    """The checkpoint is that of the last step made: not one more dispatch, let alone an epoch."""
    (step,) = re.findall(rf"error: stopped by {name} at step (\d+) with a checkpoint", text)
    assert (workdir / "checkpoints" / step).is_dir()
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) in (int(step), int(step) - 1)
    assert "Traceback" not in text
    assert not (workdir / "summary.json").exists()


def test_ctrl_c(forks, tmp_path):
    args = [*ARGS, f"--workdir={tmp_path / 'x'}"]
    ended = forks.run("experiments.cifar_cnn", args, send=[signal.SIGINT, tmp_path / "x/checkpoints/14"])
    assert ended.code == 130, ended.output
    _stopped_in_time(tmp_path / "x", ended.output, "SIGINT")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_before_training_it_stops_at_once(name, code, forks, tmp_path):
    send = [getattr(signal, name), tmp_path / "x/.lock"]
    ended = forks.run("experiments.cifar_cnn", [*ARGS, f"--workdir={tmp_path / 'x'}"], send=send)
    assert ended.code == code, ended.output
    assert ended.output.splitlines()[-1] == f"error: stopped by {name}"


def test_a_terminal_that_is_closed(env, tmp_path):
    """A real one: the kernel sends SIGHUP, and there is nowhere to print to any more."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup pytest` has it ignore
        os.execve(COMMAND[0], [*COMMAND, *ARGS, "--workdir=x"], env)
    deadline = time.monotonic() + 240
    while not (tmp_path / "x/checkpoints/14").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    steps = [int(path.name) for path in (tmp_path / "x/checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) == len((tmp_path / "x/metrics.jsonl").read_text().splitlines())


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().handled():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
