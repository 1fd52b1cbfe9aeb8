"""One of several processes is stopped, killed or cut off: the others end in bounded time and name it.

SIGTERM is tested in test_distributed.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from command import COMMAND, DIGITS
from test_kill import record

ARGS = [*DIGITS, "--config.log_every_steps=1"]
LOCAL = [sys.executable, "-m", "launch.local", "linear", "--processes=2", *ARGS]
TIMEOUT = "--config.distributed.timeout=5"  # seconds after which a silent process counts as dead


def _children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


def _restarted(env, *args):
    """Stops the second of two processes by SIGSTOP in epoch 2; returns the launcher once it has restarted both."""
    command = [*LOCAL, TIMEOUT, "--workdir=x", "--max_restarts=1", *args]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    next(line for line in process.stdout if " epoch 2/" in line)
    os.kill(_children(process)[1], signal.SIGSTOP)
    next(line for line in process.stdout if "resumed at step " in line)
    return process


@pytest.mark.faults
@pytest.mark.slow
def test_a_stopped_or_killed_process_is_named_and_all_restart_or_end(env, tmp_path):
    process = _restarted(env, "--config.num_epochs=10000")
    os.kill(_children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: process 1 gave no sign of life (stopped, or cut off from the others) and was ended" in errors
    assert "restart 1 of 1, from the newest checkpoint" in errors
    assert "error: process 0 was ended by SIGKILL, and the others with it" in errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "x/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.soak
def test_a_stopped_process_changes_no_result(env, tmp_path):
    process = _restarted(env, "--config.num_epochs=12")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    command = [*LOCAL, "--config.num_epochs=12", "--workdir=whole"]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=240)
    assert record(tmp_path / "x") == record(tmp_path / "whole")


def _ip(*args):
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")


@pytest.fixture
def two_networks():
    """Yields names and addresses of two network namespaces, joined by a virtual cable."""
    names = [f"meshwork-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", name, "link", "set", link, "up")
        yield [(name, f"10.77.0.{i + 1}") for i, name in enumerate(names)]
    except FileNotFoundError:
        pytest.skip("there is no `ip` here")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.soak
def test_a_cut_network_ends_both(two_networks, env, tmp_path):
    """The host name of each process is its address, because Gloo resolves it."""
    run = " ".join([*COMMAND, *ARGS, "--config.num_epochs=10000", TIMEOUT, f"--workdir={tmp_path / 'x'}"])
    processes = []
    for index, (name, address) in enumerate(two_networks):
        place = {"JAX_COORDINATOR_ADDRESS": f"{two_networks[0][1]}:7777", "JAX_NUM_PROCESSES": "2"}
        there = ["ip", "netns", "exec", name, "unshare", "-u", "sh", "-c", f"hostname {address} && exec {run}"]
        processes.append(
            subprocess.Popen(
                there,
                env=env | place | {"JAX_PROCESS_ID": str(index)},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        )
    deadline = time.monotonic() + 240
    while not (tmp_path / "x/checkpoints/29").exists() and all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    _ip("-n", two_networks[0][0], "link", "set", "cable", "down")
    errors = [process.communicate(timeout=120)[1].decode(errors="replace") for process in processes]
    assert all(process.returncode != 0 for process in processes)
    # Process 0 has the coordinator, which names the silent process by its index.
    assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\s1\s", errors[0]), errors[0]
    assert not (tmp_path / "x/summary.json").exists()
