"""Runs of several processes: rendezvous, equal results, a common stop, and resuming with another number."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from command import DIGITS, read_summary
from compiling import QUICKLY

from launch import job as job_lib
from launch import local
from research import app
from research.config import DistributedConfig
from research.errors import UserError
from research.process import distributed

TESTS = Path(__file__).parent
ARGS = [*DIGITS, "--config.num_epochs=2"]
LOCAL = [sys.executable, "-m", "launch.local", "linear"]


def _place(**changes):
    environment = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    return distributed.place({name: value for name, value in (environment | changes).items() if value is not None})


def test_the_environment_gives_address_count_and_index():
    assert _place() == ("host:1234", 4, 2)
    assert _place(JAX_COORDINATOR_ADDRESS=None) is None
    slurm = {"JAX_NUM_PROCESSES": None, "JAX_PROCESS_ID": None, "SLURM_NTASKS": "8", "SLURM_PROCID": "7"}
    assert _place(**slurm) == ("host:1234", 8, 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "'4' and '4'"),
        ({"JAX_NUM_PROCESSES": "two"}, "'two'"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "host:port"),
    ],
)
def test_an_impossible_environment_is_named(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        _place(**changes)


def _find_others(port, count, index, timeout, errors):
    try:
        distributed._rendezvous(f"127.0.0.1:{port}", count, index, timeout)
    except UserError as error:
        errors[index] = str(error)


def _rendezvous_errors(indices, count, timeout):
    errors: dict[int, str] = {}
    port = local.free_port()
    threads = [threading.Thread(target=_find_others, args=(port, count, i, timeout, errors)) for i in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return errors


def test_all_processes_find_each_other():
    assert _rendezvous_errors([2, 0, 1], 3, 20) == {}


def test_data_is_loaded_by_the_first_process_before_the_others(monkeypatch):
    order = []
    experiment, command = Mock(), Mock(earlier=None)
    experiment.load_data.side_effect = lambda config: order.append("load")
    monkeypatch.setattr(distributed, "wait", order.append)
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        app.load_for(experiment, command)
    barrier = "the data set is on disk"
    assert order == ["load", barrier, barrier, "load"]


def test_a_missing_process_is_named(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_SECONDS_BETWEEN_LINES", 0.5)
    errors = _rendezvous_errors([0, 2], 4, 2)
    assert errors[0].startswith("processes 1, 3 of 4 did not connect within 2 s")
    assert "--config.distributed.timeout" in errors[0]
    assert "waiting for processes 1, 3 of 4: " in capsys.readouterr().err
    assert _rendezvous_errors([1], 2, 1)[1].startswith("process 0 at 127.0.0.1:")


def test_start(monkeypatch):
    """`never` ignores the environment; `always` is an error where no other process is found."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nonsense")
    distributed.join(DistributedConfig(start="never"))
    with pytest.raises(UserError):
        distributed.join(DistributedConfig())
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    distributed.join(DistributedConfig())
    with pytest.raises(UserError, match="the other processes were not found"):
        distributed.join(DistributedConfig(start="always"))


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The workdir and the finished command of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    # Behind a proxy, which cannot reach this machine.
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    env = os.environ | {"XLA_FLAGS": QUICKLY, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"} | proxies
    command = [*LOCAL, "--processes=2", *ARGS, f"--workdir={folder}", "--config.log_every_steps=1"]
    return folder, subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(two, env, tmp_path):
    folder, done = two
    assert done.returncode == 0, done.stderr
    assert "[0] linear: digits (1,437 train, 360 test), 2 cpu devices" in done.stdout
    assert "[1] linear" not in done.stdout
    assert re.search(r"\[0\] each device holds [\d.]+ of [\d.]+ MiB of parameters, [\d.]+ of ", done.stdout)
    summary = read_summary(folder)
    assert (summary["process_count"], summary["device_count"]) == (2, 2)
    command = [sys.executable, "-m", "linear", *ARGS, "--config.log_every_steps=1"]
    subprocess.run([*command, f"--workdir={tmp_path / 'one'}"], env=env, check=True, capture_output=True)
    losses = [[line["loss"] for line in _lines(each) if "loss" in line] for each in (folder, tmp_path / "one")]
    assert len(losses[0]) == 29
    np.testing.assert_allclose(*losses, rtol=1e-3)


# A mesh as on a TPU slice, where the chips of a host are not adjacent on the `data` axis.
TANGLED = """
from linear import EXPERIMENT
from research import app, sharding

arranged = sharding._arranged
sharding._arranged = lambda shape, devices: arranged(shape, [devices[i] for i in (0, 2, 1, 3)])

if __name__ == "__main__":
    app.main(EXPERIMENT)
"""


@pytest.mark.slow
def test_the_rows_of_a_host_need_not_be_adjacent(two, env, tmp_path):
    """Each process streams the examples of its own rows of the batch."""
    (tmp_path / "tangled.py").write_text(TANGLED)
    flags = {"XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count=2"}
    command = [*LOCAL[:-1], "tangled", "--processes=2", *ARGS, "--workdir=x", "--config.log_every_steps=1"]
    env = env | flags | {"PYTHONPATH": f"{env['PYTHONPATH']}:{tmp_path}"}
    done = subprocess.run(
        [*command, "--config.dataset.max_device_gib=0"], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in _lines(each) if "loss" in line] for each in (two[0], tmp_path / "x")]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_time_axis(env, tmp_path):
    """Each has half of the time steps of all examples."""
    args = ["experiments.char_rnn", "--config=lru", "--config.dataset.name=pydoc", "--config.model.width=16"]
    args += ["--config.model.layers=2", "--config.sequence_length=32", "--config.batch_size=64"]
    args += ["--config.num_steps=8", "--config.log_every_steps=1"]
    mesh = ["--processes=2", "--config.mesh.data=1", "--config.mesh.sequence=2"]
    for command in (["launch.local", *args, *mesh, "--workdir=two"], [*args, "--workdir=one"]):
        done = subprocess.run([sys.executable, "-m", *command], env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / "two")["process_count"] == 2
    losses = [[line["loss"] for line in _lines(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(two, env):
    folder, _ = two
    command = [sys.executable, "-m", "linear", f"--workdir={folder}", "--config.num_epochs=3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 29 of 44" in done.stdout
    assert read_summary(folder)["process_count"] == 1


def _children(process):
    """The process ids of the launcher's processes, in order of their index."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def _started(env, *args):
    """Starts a long run of two processes and returns once it has a checkpoint."""
    command = [*LOCAL, "--processes=2", *ARGS, "--config.num_epochs=500", *args]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if " epoch 3/" in line:  # the first checkpoint is complete
            return process
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_with_a_checkpoint(env, tmp_path):
    process = _started(env, "--workdir=x")
    os.kill(_children(process)[1], signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert len(re.findall(r"stopped by SIGTERM at step [\d,]+ with a checkpoint", errors)) == 2
    assert len(set(re.findall(r"at step ([\d,]+) with", errors))) == 1
    assert not (tmp_path / "x/summary.json").exists()


def test_bad_input_starts_nothing(env, tmp_path):
    done = subprocess.run([*LOCAL, "--config.optimizer.nam=sgd"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean --config.optimizer.name" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = subprocess.run([*LOCAL, "--dry_run", "--processes=3", *ARGS], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(f"JAX_PROCESS_ID={i} " in line and " linear " in line for i, line in enumerate(lines))
    assert not list(tmp_path.glob("runs"))


# One of two processes fails while the other waits for it: jax alone would end both by SIGABRT.
FAILING = """
import dataclasses, os
import linear
from research import app, errors

def make_task(config, dataset):
    if os.environ["JAX_PROCESS_ID"] == os.environ["FAILS"]:
        raise errors.OutOfMemoryError("no memory")
    return linear.EXPERIMENT.make_task(config, dataset)

EXPERIMENT = dataclasses.replace(linear.EXPERIMENT, make_task=make_task)

if __name__ == "__main__":
    app.main(EXPERIMENT)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "fails", "said"),
    [
        (["launch.local", "--processes=2"], "0", "error: process 0 ended with exit code 5, and the others with it"),
        (["launch.scaling", "--devices=2"], "1", "error: process 1 of 2 failed: error: no memory"),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed(launcher, fails, said, env, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    env = env | {"FAILS": fails, "PYTHONPATH": f"{env['PYTHONPATH']}:{tmp_path}"}
    module, *flags = launcher
    command = [sys.executable, "-m", module, "failing", *flags, *DIGITS, "--workdir=x"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("codes", "failed"), [([None, 0], None), ([None, -6, 5], (2, 5)), ([-6, -9], (1, -9)), ([0, -6], (1, -6))]
)
def test_processes_aborted_by_jax_are_not_the_first_failure(codes, failed):
    assert local.first_failed(codes) == failed


def test_a_failure_between_two_polls_is_seen(monkeypatch):
    class Ended:
        answers = iter([None, (0, 3)])

        def __init__(self, *_):
            pass

        def failed(self):
            return next(self.answers)

        def running(self):
            return False

        def end(self, _):
            return []

    monkeypatch.setattr(local, "_Processes", Ended)
    job = job_lib.parse("local", "", local.LocalOptions(), ["linear", "--config.dataset.name=digits"])
    assert local._run_once(job, []) == 3
