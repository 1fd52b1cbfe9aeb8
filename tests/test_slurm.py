"""`launch.slurm` on a real Slurm: a controller and two nodes on this machine, started by the test."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import DIGITS, QUICK

from launch import slurm as slurm_launcher
from launch.local import free_port
from research.errors import UserError

SLURM = [sys.executable, "-m", "launch.slurm", "experiments.cifar_cnn"]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# A requeued job waits until its credential has expired: two minutes, unless told otherwise.
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
KillWait=60
SchedulerParameters=sched_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


def _munged(folder):
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    options = [f"--{name}={folder / file}" for name, file in {**files, "seed-file": "munge.seed"}.items()]
    return ["munged", "--force", "--foreground", *options]


@pytest.fixture
def slurm(tmp_path, env):
    """The environment in which Slurm's commands find a cluster of two nodes."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"no Slurm here: {', '.join(missing)} (Debian's package slurm-wlm)")
    if os.getuid():
        pytest.skip("Slurm's daemons are started as root")
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        pytest.skip("this machine's own name has no address, by which its processes would meet")
    folder = tmp_path / "slurm"
    folder.mkdir(mode=0o755)
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports))
    env = env | {"SLURM_CONF": str(folder / "slurm.conf"), "XLA_FLAGS": ""}
    nodes = [["slurmd", "-D", "-N", name] for name in ("n1", "n2")]
    with contextlib.ExitStack() as stack:
        for command in (_munged(folder), ["slurmctld", "-D", "-i"], *nodes):
            log = stack.enter_context((folder / f"{command[0]}.out").open("ab"))
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.send_signal, signal.SIGKILL)
            time.sleep(1)
        deadline = time.monotonic() + 30
        while " idle" not in _shown(env, "sinfo", "-h"):
            if time.monotonic() > deadline:
                pytest.skip(f"Slurm does not start here: {[p.read_text()[-500:] for p in folder.glob('*.out')]}")
            time.sleep(0.5)
        yield env
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=env)
        time.sleep(1)


def _shown(env, *command):
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout


def _until(true, seconds, folder):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, [path.read_text()[-2000:] for path in folder.glob("*.log")]
        time.sleep(0.5)


def _logged(workdir, text):
    return any(text in path.read_text(errors="replace") for path in workdir.glob("slurm-*.log"))


@pytest.mark.slow
def test_two_nodes_train_are_requeued_go_on_and_are_cancelled(slurm, tmp_path):
    workdir = tmp_path / "x"
    data, counts = ["--config.dataset.name=digits"], "(1,437 train, 360 test)"
    if data_dir := os.environ.get("TFDS_DATA_DIR"):
        data, counts = (
            [f"--config.dataset.data_dir={data_dir}", "--config.dataset.train_fraction=0.1"],
            "(5,000 train, 10,000 test)",
        )
    args = [*QUICK, *data, "--config.num_epochs=1000", "--nodes=2", f"--workdir={workdir}"]
    launcher = subprocess.Popen([*SLURM, *args], env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _until(lambda: _logged(workdir, "epoch 1/1000"), 240, workdir)
    assert _logged(workdir, f"{counts}, 2 cpu devices")
    (number,) = _shown(slurm, "squeue", "-h", "-o", "%i").split()
    subprocess.run(["scancel", "--signal=TERM", number], env=slurm, check=True)  # as before the time limit
    _until(lambda: _logged(workdir, "resumed at step "), 240, workdir)
    subprocess.run(["scancel", number], env=slurm, check=True)
    output, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 143
    assert re.search(rf"job {number}: .*/x/job.sh", errors)
    assert f"job {number}: running" in errors
    assert "resumed at step " in output
    assert "JobState=CANCELLED" in _shown(slurm, "scontrol", "show", "job", number)


def test_the_script_says_what_was_asked(env, tmp_path):
    options = ["--nodes=4", "--gpus_per_node=8", "--partition=gpu", "--time=1:00:00", "--account=me", "--dry_run"]
    more = ["--cpus_per_process=12", "--seconds_to_stop=300", "--workdir=/shared/x y%j"]
    done = subprocess.run([*SLURM, *options, *more, *DIGITS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=12",
        "partition=gpu",
        "time=1:00:00",
        "account=me",
        "signal=TERM@300",
        "requeue",
    ):
        assert f"#SBATCH --{line}\n" in done.stdout
    assert "#SBATCH --output='/shared/x y%%j/slurm-%j.log'\n" in done.stdout
    assert "'--workdir=/shared/x y%j'" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert not Path("/shared/x y%j").exists()


@pytest.mark.slow
def test_without_slurm_it_says_so(env, tmp_path):
    done = subprocess.run([*SLURM, *DIGITS], env=env | {"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sbatch is not installed on this machine" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_workdir_elsewhere_is_named_by_a_dry_run_too():
    with pytest.raises(UserError, match="give a folder on this machine"):
        slurm_launcher.run(["experiments.cifar_cnn", *DIGITS, "--workdir=gs://b/x", "--dry_run"])


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_submitted(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/false")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x cannot be created: Not a directory"):
        slurm_launcher.run(["experiments.cifar_cnn", *DIGITS, f"--workdir={tmp_path}/file/x"])


@pytest.mark.parametrize(("last", "code"), [("", 0), ("slurm_load_jobs error: Invalid job id specified", 1)])
def test_a_controller_that_does_not_answer_is_asked_again(last, code, tmp_path, monkeypatch, capsys):
    """`squeue` and `scontrol` fail once each, as they do on a busy cluster."""
    for name, answer in (("squeue", f"echo '{last}' >&2; test -z '{last}'"), ("scontrol", "echo ExitCode=0:0")):
        script = tmp_path / name
        known = "" if name == "squeue" or not last else f"echo '{last}' >&2; exit 1\n"
        fails = f"test -e {tmp_path}/{name}.once || {{ touch {tmp_path}/{name}.once; echo timed out >&2; exit 1; }}"
        script.write_text(f"#!/bin/sh\n{fails}\n{known}{answer}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm_launcher, "_POLL_SECONDS", 0.01)
    assert slurm_launcher._follow("77", tmp_path / "log") == code
    assert "job 77: unknown (timed out)\n" in capsys.readouterr().err


def test_a_workdir_that_takes_no_script_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    (tmp_path / "job.sh").mkdir()
    with pytest.raises(UserError, match="job"):
        slurm_launcher.run(["experiments.cifar_cnn", *DIGITS, f"--workdir={tmp_path}"])
