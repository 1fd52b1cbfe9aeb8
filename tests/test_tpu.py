"""`launch.tpu`: its command lines are gcloud's, and the whole flow runs on a stand-in whose hosts are folders here."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import DIGITS, read_summary

from launch import job as job_lib
from launch import tpu

TPU = [sys.executable, "-m", "launch.tpu"]

# Two hosts of one TPU. The first time they train they are taken away in the middle.
GCLOUD = """#!{python}
import os, pathlib, shutil, subprocess, sys, time
root = pathlib.Path("{root}")
kind, verb, *args = sys.argv[3:]
flags = dict(arg[2:].partition("=")[::2] for arg in args if arg.startswith("--"))
with (root / "calls").open("a") as calls:
    print(kind, verb, file=calls)
hosts = [root / f"host{{i}}" for i in range(2)]
state = root / "state"
if verb == "create":
    assert flags["zone"] == "here" and flags["accelerator-type"] == "v6e-16"
    for host in hosts:
        host.mkdir()
    state.write_text("READY")
elif verb == "describe":
    print(state.read_text() if state.exists() else sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm) NOT_FOUND: t"))
elif verb == "delete":
    for host in hosts:
        shutil.rmtree(host)
    state.unlink()
elif verb == "scp":
    for host in hosts:
        shutil.copy(args[0], host / args[1].partition(":")[2])
elif verb == "ssh":
    started = []
    for number, host in enumerate(hosts):
        place = {{"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}}
        env = os.environ | place | {{"JAX_PROCESS_ID": str(number), "HOME": str(host)}}
        command = ["bash", "-c", flags["command"]]
        started.append(subprocess.Popen(command, cwd=host, env=env, start_new_session=True))
    if "experiments" in flags["command"] and not (root / "preempted").exists():
        record = root / "record/metrics.jsonl"
        while not (record.exists() and "test_loss" in record.read_text()[:-1].rpartition("test_loss")[0]):
            assert all(process.poll() is None for process in started)
            time.sleep(0.2)
        (root / "preempted").touch()
        state.write_text("PREEMPTED")
        for process in started:
            os.killpg(process.pid, 9)
    sys.exit(max(abs(process.wait()) for process in started))
"""


@pytest.fixture
def gcloud(tmp_path, env):
    """The environment in which gcloud is the stand-in."""
    from launch.local import free_port

    path = tmp_path / "bin/gcloud"
    path.parent.mkdir()
    path.write_text(GCLOUD.format(python=sys.executable, root=tmp_path, port=free_port()))
    path.chmod(0o755)
    return env | {"PATH": f"{path.parent}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_up_creates_installs_trains_comes_back_from_preemption_and_deletes(gcloud, tmp_path):
    repository = Path(__file__).parent.parent
    python = shlex.quote(sys.executable)
    script = shlex.quote(f'#!/bin/sh\nexec {python} "$@"\n')
    install = f"mkdir -p meshwork/.venv/bin; cd meshwork/.venv/bin; printf {script} > python; chmod +x python"
    args = ["--name=t", "--zone=here", "--accelerator=v6e-16", f"--install={install}", "--spot"]
    command = [*TPU, "up", "experiments.cifar_cnn", *args, *DIGITS, "--config.num_epochs=12"]
    gcloud = gcloud | {"PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, f"--workdir=file://{tmp_path}/record"], cwd=repository, env=gcloud, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "the TPU was preempted: restart 1 of 10" in done.stderr
    assert "resumed at step " in done.stdout
    assert read_summary(tmp_path / "record")["process_count"] == 2
    calls = (tmp_path / "calls").read_text().splitlines()
    once = ["create", "describe", "scp", "ssh", "ssh"]
    verbs = [call.split()[1] for call in calls]
    assert [v for i, v in enumerate(verbs) if v != verbs[i - 1] or v != "describe"] == [
        "describe",  # whether there is one of that name
        *once,
        "describe",
        "delete",
        *once,
        "delete",
    ]
    log = done.stderr.rpartition("log: ")[2].strip()
    assert "cifar_cnn on digits" in (repository / log).read_text()
    shutil.rmtree((repository / log).parent)


def _dry(capsys, *args):
    assert tpu.run([*args, "--dry_run"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("flags", "last"), [((), "delete"), (("--keep",), "ssh")])
def test_what_is_kept_is_not_deleted(flags, last, capsys):
    assert _dry(capsys, "up", "experiments.cifar_cnn", "--workdir=gs://b/x", *flags)[-1][4] == last


def test_hosts_can_run_a_worker_of_a_sweep(capsys):
    assert "sweep,postgres]" in _dry(capsys, "setup")[1][-1]
    assert "sweep,postgres]" in (Path(__file__).parent.parent / "Dockerfile").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("create", "--accelerator=v4-8", "--reserved"),
        ("create", "--accelerator=v5litepod-16", "--queued", "--spot", "--project=p"),
        ("setup",),
        ("status",),
        ("status", "--queued"),
        ("logs",),
        ("stop",),
        ("delete",),
        ("delete", "--queued"),
        ("run", "experiments.cifar_cnn", "--workdir=gs://b/x"),
        ("run", "experiments.cifar_cnn", "--workdir=gs://b/x", "--mount=gs://abc/d:/data"),
    ],
)
def test_gcloud_itself_takes_the_commands(args, env, capsys):
    if not shutil.which("gcloud"):
        pytest.skip("no gcloud here")
    for command in _dry(capsys, *args, "--zone=us-central1-a"):
        done = subprocess.run([*command, "--project=p"], env=env, capture_output=True, text=True)
        # Offline, a right command fails for want of an account, a wrong one before that.
        assert "unrecognized arguments" not in done.stderr
        assert "ERROR" in done.stderr
        assert "account" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_is_the_accelerators(accelerator, runtime):
    assert f"--version={runtime}" in tpu.Tpu(tpu.TpuOptions(accelerator=accelerator)).create()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fly"], "unexpected 'fly': the first argument is one of up, run, create"),
        (["create", "--accelerator=tpu7x-8"], "use launch.gke"),
        (["create", "--accelerator=v9-8"], "for another one give --runtime"),
        (["create", "--zoen=x"], "unexpected '--zoen=x'"),
        (["run", "experiments.cifar_cnn", "--workdir=here"], "give gs://BUCKET/FOLDER"),
        (["run", "experiments.nothing", "--workdir=gs://b/x"], "cannot import experiments.nothing"),
        (["up"], "name one experiment"),
    ],
)
def test_bad_input_is_named_before_anything_is_created(args, words, env, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.tpu", *args])
    with pytest.raises(SystemExit) as exit_:
        job_lib.main(tpu.run)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert len(errors.splitlines()) == 1


def test_what_git_ignores_is_not_copied(tmp_path):
    import tarfile

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name, text in ((".gitignore", "data\n"), ("data", "large"), ("new.py", "x = 1")):
        (tmp_path / name).write_text(text)
    tpu.archive(tmp_path, tmp_path.parent / "a.tar.gz")
    with tarfile.open(tmp_path.parent / "a.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["meshwork/.gitignore", "meshwork/new.py"]
