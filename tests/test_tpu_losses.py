"""`launch.tpu up` when TPUs are taken away, fail or are there already, on a stand-in for gcloud that does no work."""

import os
import subprocess
import sys

import pytest
from command import DIGITS

from launch import job as job_lib
from launch import tpu
from research.errors import UserError

# A TPU's fate is a line of the file "fates": at which command it gets into which state. Errors are worded as gcloud's.
GCLOUD = """#!{python}
import os, pathlib, signal, sys, time
root = pathlib.Path("{root}")
kind, verb, *args = sys.argv[3:]
with (root / "calls").open("a") as calls:
    print(verb, file=calls)
state, fates, fate = root / "state", root / "fates", root / "fate"
if verb == "create" and fates.read_text() == "taken":
    state.write_text("READY")
    sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.create) ALREADY_EXISTS: Resource 'nodes/t' already exists")
if verb == "create" and fates.read_text().startswith("taken-lost"):
    fates.write_text("")
    state.write_text("PREEMPTED")
    sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.create) ALREADY_EXISTS: Resource 'nodes/t' already exists")
if verb == "create":
    first, _, rest = fates.read_text().partition("\\n")
    fates.write_text(rest)
    fate.write_text(first)
    state.write_text("ACTIVE" if kind == "queued-resources" else "READY")
when, _, what = (fate.read_text() if fate.exists() else "").partition(" ")
if verb == when:
    state.write_text(what) if what else state.unlink(missing_ok=True)
if verb in ("describe", "delete") and not state.exists():
    sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm." + verb + ") NOT_FOUND: Resource 'nodes/t' was not found")
if verb == "describe" and state.read_text() == "UNKNOWN":
    sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.describe) UNAVAILABLE: try again")
if verb == "describe":
    print(state.read_text() if args[-1].startswith("--format=value(") else "error: no quota")
    sys.exit()
if verb == "delete":
    if what == "STUCK":
        sys.exit("ERROR: (gcloud.compute.tpus.tpu-vm.delete) Reauthentication failed")
    state.unlink()
if verb == when == "ssh" and what == "STOP":
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
sys.exit(verb == when)
"""

UP = ["up", "experiments.cifar_cnn", "--name=t", "--workdir=gs://b/x", *DIGITS]
ALL = ["create", "describe", "scp", "ssh", "ssh"]  # of a TPU that nothing happens to


@pytest.fixture
def up(tmp_path, monkeypatch, capfd):
    """`up(*flags, fates=(...))` is (exit code, the commands that gcloud was given, what was said)."""
    root = tmp_path / "cloud"
    root.mkdir()
    (root / "gcloud").write_text(GCLOUD.format(python=sys.executable, root=root))
    (root / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu, "_POLL_SECONDS", 0.01)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)

    def run(*flags, fates=(), state=None):
        (root / "fates").write_text("\n".join(fates))
        if state:
            (root / "state").write_text(state)
        monkeypatch.setattr(sys, "argv", ["launch.tpu", *UP, *flags])
        with pytest.raises(SystemExit) as exit_:
            job_lib.main(tpu.run)
        calls = root / "calls"
        return exit_.value.code, calls.read_text().split() if calls.exists() else [], capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("fate", "calls", "said"),
    [
        ("create PREEMPTED", ["create", "describe", "describe"], "preempted"),
        ("describe PREEMPTED", ["create", "describe"], "preempted"),
        ("describe TERMINATED", ["create", "describe"], "terminated"),
        ("describe ", ["create", "describe"], "lost"),
        ("scp PREEMPTED", [*ALL[:3], "describe"], "preempted"),
        ("scp ", [*ALL[:3], "describe"], "lost"),
        ("ssh STOPPED", [*ALL[:4], "describe"], "stopped"),
    ],
)
def test_one_that_is_lost_before_it_trains_is_replaced(up, fate, calls, said):
    code, called, errors = up(fates=[fate])
    again = ["delete", "describe"] if said == "lost" else ["delete"]
    assert code == 0
    assert called == ["describe", *calls, *again, *ALL, "delete"]
    assert f"the TPU was {said}: restart 1 of 10\n" in errors


def test_buckets_are_mounted_again_on_a_replacement(up):
    code, called, _ = up("--mount=gs://abc:/data", fates=["ssh PREEMPTED"])
    first, replacement = [*ALL[:4], "describe", "delete"], [*ALL, "ssh", "delete"]
    assert (code, called) == (0, ["describe", *first, *replacement])


def test_a_suspended_queued_resource_is_replaced_too(up):
    code, called, errors = up("--queued", fates=["describe SUSPENDED"])
    assert (code, called.count("create"), called.count("delete")) == (0, 2, 2)
    assert "the TPU was suspended: restart 1 of 10\n" in errors


@pytest.mark.parametrize("fate", ["describe PREEMPTED", "scp PREEMPTED"])
def test_there_are_no_more_replacements_than_allowed(up, fate):
    code, called, errors = up("--max_restarts=2", fates=[fate] * 9)
    assert (code, called.count("create"), called.count("delete")) == (143, 3, 3)
    assert errors.count(": restart ") == 2
    assert "error: the TPU was preempted, and --max_restarts=2 allows no more: the same command resumes" in errors


@pytest.mark.parametrize("fate", ["create CREATING", "scp READY", "ssh READY"])
def test_a_setup_that_fails_by_itself_is_not_tried_again(up, fate):
    code, called, errors = up(fates=[fate])
    assert (code, called.count("create"), called[-1]) == (2, 1, "delete")
    assert "failed with exit code 1: see its output above" in errors


def test_a_queued_resource_that_failed_says_why_and_ends(up):
    code, called, errors = up("--queued", fates=["describe FAILED"])
    assert (code, called.count("create"), called[-1]) == (2, 1, "delete")
    assert "the queued resource failed for the reason shown above" in errors


def test_what_is_left_of_a_lost_one_makes_room(up):
    code, called, _ = up(state="PREEMPTED")
    assert code == 0
    assert called == ["describe", "delete", *ALL, "delete"]


@pytest.mark.parametrize("state", ["READY", "CREATING", "STOPPED"])
def test_one_that_somebody_may_use_is_left_alone(up, state):
    code, called, errors = up(state=state)
    assert (code, called) == (2, ["describe"])
    assert f"--name=t: this TPU exists already ({state.lower()}): use it with `run`" in errors


def test_one_that_somebody_made_meanwhile_is_left_alone(up):
    code, called, errors = up(fates=["taken"])
    assert (code, called) == (2, ["describe", "create", "describe"])
    assert "ALREADY_EXISTS" in errors
    assert "failed with exit code 1: see its output above" in errors


def test_one_that_could_not_be_deleted_at_once_is_deleted_before_the_next(up):
    """Its delete fails once, so that gcloud refuses to create the next."""
    code, called, errors = up(fates=["scp PREEMPTED", "taken-lost", ""])
    assert code == 0
    assert called[-2:] == ["ssh", "delete"]
    assert "ALREADY_EXISTS" in errors


def test_nothing_is_created_where_gcloud_cannot_say_what_there_is(up):
    code, called, errors = up(state="UNKNOWN")
    assert (code, called) == (2, ["describe"])
    assert "gcloud cannot tell whether a TPU with this name exists" in errors


def test_a_signal_deletes_it(up):
    code, called, errors = up(fates=["ssh STOP"])
    assert (code, called) == (143, ["describe", *ALL[:4], "delete"])
    assert errors.endswith("error: stopped by SIGTERM\n")


def test_one_that_cannot_be_deleted_is_named(up):
    code, called, errors = up("--max_restarts=0", fates=["scp STUCK"])
    assert (code, called[-2:]) == (143, ["delete", "describe"])
    assert "the TPU may still exist and incur costs: `gcloud compute tpus tpu-vm delete t --quiet` deletes it" in errors


def test_what_cannot_be_packed_creates_nothing(up, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    code, called, errors = up()
    assert (code, called) == (2, [])
    assert "is not a git checkout, from which `setup` takes the files to copy" in errors


def test_without_gcloud_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="gcloud is not installed on this machine"):
        tpu.run(["status"])


# Saves its checkpoint for a while after SIGTERM.
MODULE = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "args",
    [
        ["experiments.cifar_cnn"],
        ["launch.sweep", "experiments.cifar_cnn", "--storage=postgresql://h/d", "--search=model.width=[8,16]"],
    ],
)
def test_stop_ends_what_run_started_once_it_has_saved(args, tmp_path):
    python = tmp_path / "meshwork/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    path = tmp_path / "meshwork" / f"{args[0].replace('.', '/')}.py"
    path.parent.mkdir()
    path.with_name("__init__.py").touch()
    path.write_text(MODULE)
    job = job_lib.parse("tpu", "", tpu.TpuOptions(), [*args, "--workdir=gs://b/x"])

    def host(command):
        (text,) = (arg.removeprefix("--command=") for arg in command if arg.startswith("--command="))
        env = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": ""}
        return subprocess.Popen(
            ["bash", "-c", text], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    commands = tpu.Tpu(job.options)
    run = host(commands.run(job))
    assert run.stdout.readline() == "started\n"
    assert host(commands.stop()).wait() == 0
    assert run.communicate(timeout=30)[0] == "saved\n"
    assert run.returncode == 143
    nothing = host(commands.stop())
    assert nothing.communicate(timeout=30)[1].startswith("no process to stop on ")
    assert nothing.returncode == 1
