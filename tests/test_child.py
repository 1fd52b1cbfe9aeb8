"""Processes that a launcher has started on this machine stop if it is killed."""

import os
import select
import subprocess
import sys

import pytest
from command import DIGITS

from launch import local, scaling
from launch.sweeps import processes
from research.process import child

# Waits for a signal in place of training.
WAITING = """
import dataclasses, os, pathlib, signal
import linear
from research import app

def run(experiment, argv, signals):
    print("waiting", flush=True)
    try:
        signal.pause()
    finally:
        pathlib.Path("stopped" + os.environ["JAX_PROCESS_ID"]).write_text(signals.received.name)

EXPERIMENT = dataclasses.replace(linear.EXPERIMENT, run=run)

if __name__ == "__main__":
    app.main(EXPERIMENT)
"""


@pytest.mark.slow
def test_the_processes_of_a_killed_launcher_receive_sigterm(env, tmp_path):
    (tmp_path / "waits.py").write_text(WAITING)
    env = env | {"PYTHONPATH": f"{env['PYTHONPATH']}:{tmp_path}"}
    command = [sys.executable, "-m", "launch.local", "waits", "--processes=2", *DIGITS, "--workdir=x"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[0] waiting\n", "[1] waiting\n"]
        found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        assert len(found) == 2
        children = [os.pidfd_open(int(pid)) for pid in found]
        launcher.kill()
        for ended in children:
            assert select.select([ended], [], [], 60)[0], "still running"
            os.close(ended)
    assert [(tmp_path / f"stopped{index}").read_text() for index in range(2)] == ["SIGTERM", "SIGTERM"]


class _StartedError(Exception):
    pass


@pytest.mark.parametrize(
    "start",
    [
        lambda: processes.run(2, [], lambda: None),
        lambda: scaling._started(["true"], 1, communicate=False),
        lambda: local._start(["true"], {}),
    ],
)
def test_every_launcher_of_local_processes_starts_them_so_that_they_stop_with_it(start, monkeypatch):
    def started(*_, **__):
        raise _StartedError

    monkeypatch.setattr(child, "start", started)
    with pytest.raises(_StartedError):
        start()
