"""`launch.scaling`: efficiency is communicating over concurrent, and the report is left."""

import json
import re
import signal
import subprocess
import sys

import pytest
from command import DIGITS

from experiments.cifar_cnn import EXPERIMENT
from launch import job as job_lib
from launch import scaling
from research import flags
from research.errors import UserError
from research.process.signals import StoppedError

SCALING = [sys.executable, "-m", "launch.scaling", "experiments.cifar_cnn", *DIGITS]


def _reports(batch_size, *seconds):
    return [{"batch_size": batch_size, "step_seconds": s, "collective_seconds": 0.1} for s in seconds]


def test_efficiency_is_the_speed_of_those_that_communicate_over_that_of_the_others():
    together = [_reports(200, 1.0, 1.25), _reports(200, 2.0, 2.0), _reports(200, 1.0, 1.0)]
    apart = [_reports(100, 1.0, 1.0), _reports(100, 2.0, 1.0), _reports(100, 1.0, 1.0)]
    row = scaling.row(together, apart, "weak")
    assert row["devices"] == 2
    assert row["examples_per_second"] == pytest.approx(160)
    assert row["examples_per_second_apart"] == pytest.approx(200)
    assert (row["efficiency"], row["efficiency_min"], row["efficiency_max"]) == pytest.approx((0.8, 100 / 150, 1.0))


@pytest.mark.parametrize(("text", "words"), [("1,x", "--devices=1,x"), ("0", "--devices=0"), ("", "--devices=")])
def test_devices_that_are_no_numbers_are_named(text, words):
    with pytest.raises(UserError, match=words):
        scaling.counts(text)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_named(env):
    args = ["--mode=strong", "--devices=1,5"]
    done = subprocess.run([*SCALING, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--config.batch_size=96 cannot be split over 5 devices" in done.stderr


def test_a_process_has_one_device_whatever_this_one_was_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    print_flags = [sys.executable, "-c", "import os; print(os.environ['XLA_FLAGS'])"]
    (process,) = scaling._started(print_flags, 1, communicate=False)
    assert process.communicate()[0] == "--xla_a=1 --xla_b=2\n"


def test_processes_that_shall_not_meet_are_refused():
    with pytest.raises(UserError, match="the processes must communicate; leave it out"):
        scaling.run(["experiments.cifar_cnn", *DIGITS, "--config.distributed.start=never"])


@pytest.mark.parametrize(
    ("workdir", "words"), [("file/x", "file/x cannot be created: Not a directory"), ("gs://b/x", "on a local disk")]
)
def test_a_record_that_cannot_be_kept_is_named_before_anything_is_measured(workdir, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(scaling, "_measured", None)
    with pytest.raises(UserError, match=words):
        scaling.run(["experiments.cifar_cnn", *DIGITS, "--devices=1", f"--workdir={workdir}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_the_report_is_left(env, tmp_path):
    args = ["--devices=1,2", "--rounds=1", "--config.steps_per_dispatch=2", "--workdir=x"]
    done = subprocess.run([*SCALING, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "x/scaling.json").read_text())
    assert (one["devices"], one["batch_size"], one["efficiency"]) == (1, 96, 1.0)
    assert (two["devices"], two["batch_size"], two["mode"]) == (2, 192, "weak")
    assert one["collective_seconds"] == 0.0
    assert 0 < two["collective_seconds"] < two["step_seconds"] * 5
    assert (tmp_path / "x/scaling.png").stat().st_size > 1000
    assert len([line for line in done.stdout.splitlines() if line.startswith("| 1 |") or line.startswith("| 2 |")]) == 2


_FAILS_OR_HANGS = """
import os, sys, time
if os.environ["JAX_PROCESS_ID"] == "0":
    time.sleep(60)
sys.exit("error: no memory")
"""


@pytest.fixture
def started(monkeypatch):
    """The processes that are started."""
    processes, start = [], scaling._started

    def starts(*args, **kwargs):
        processes.extend(start(*args, **kwargs))
        return processes

    monkeypatch.setattr(scaling, "_started", starts)
    return processes


def test_one_that_fails_ends_those_before_it_at_once(started):
    """Process 0 hangs, as one that waits for another does."""
    with pytest.raises(UserError, match="process 1 of 2 failed: error: no memory"):
        scaling._measured([sys.executable, "-c", _FAILS_OR_HANGS], 2, communicate=True)
    assert started[0].returncode == -signal.SIGKILL


def test_a_signal_ends_the_processes_too(started, tmp_path, monkeypatch):
    # Which sends its parent, this process, the signal.
    sleeps = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    monkeypatch.setattr(scaling, "_command", lambda *_, **__: [sys.executable, "-c", sleeps])
    with pytest.raises(StoppedError, match="SIGTERM"):
        scaling.run(["experiments.cifar_cnn", *DIGITS, "--devices=1", f"--workdir={tmp_path}"])
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("print('error: no memory'); print('W0101 noise'); sys.exit(5)", 5, "process 0 of 1 failed: error: no memory"),
        ("raise ValueError('a defect')", 1, "process 0 of 1 failed: ValueError: a defect"),
        ("os.kill(os.getpid(), 9)", 137, "process 0 of 1 was killed by SIGKILL: it printed nothing"),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed(ends, code, said, tmp_path, monkeypatch, capsys):
    program = f"import os, sys; sys.stdout = sys.stderr; {ends}"
    monkeypatch.setattr(scaling, "_command", lambda *_, **__: [sys.executable, "-c", program])
    arguments = ["experiments.cifar_cnn", *DIGITS, "--devices=1", f"--workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["launch.scaling", *arguments])
    with pytest.raises(SystemExit) as exit_:
        job_lib.main(scaling.run)
    errors = capsys.readouterr().err.splitlines()
    assert (exit_.value.code, errors[-1]) == (code, f"error: {said}")
    assert ("Traceback (most recent call last):" in errors) == (code == 1)


# Notes what it is, and reports.
_NOTES = """
import json, os, sys
names = ("XLA_FLAGS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "CUDA_VISIBLE_DEVICES")
there = "JAX_COORDINATOR_ADDRESS" in os.environ
with open("notes", "a") as file:
    print([os.environ.get(n) for n in names], there, sorted(os.sched_getaffinity(0)), sys.argv[1:], file=file)
print(json.dumps({"batch_size": 1, "step_seconds": 1.0, "collective_seconds": 0.0}))
"""


@pytest.mark.parametrize("gpus", [None, "2,3"])
def test_a_dry_run_prints_what_is_run(gpus, tmp_path, monkeypatch, capsys):
    if gpus:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "_command", lambda _, n, **kind: [sys.executable, "-c", _NOTES, str(n), str(kind)])
    arguments = ["experiments.cifar_cnn", *DIGITS, "--devices=1,2", "--rounds=1", "--workdir=x"]
    assert scaling.run(arguments) == 0
    done = sorted((tmp_path / "notes").read_text().splitlines())
    (tmp_path / "notes").unlink()
    capsys.readouterr()
    assert scaling.run([*arguments, "--dry_run"]) == 0
    subprocess.run(["bash", "-e"], input=capsys.readouterr().out, text=True, check=True, stdout=subprocess.DEVNULL)
    assert sorted((tmp_path / "notes").read_text().splitlines()) == done
    assert len(done) == 1 + 2 + 2  # one has nobody to be apart from
    first, second = gpus.split(",") if gpus else "01"
    # Of processes that do not communicate, and so do not learn from jax which GPU is theirs: one, and two.
    assert re.findall(r"'(\d)'\] False", "\n".join(done)) == [first, first, second]


def test_a_device_by_itself_has_a_mesh_of_its_own(capsys):
    """However the mesh of those that communicate is split; and the config's own steps a dispatch count."""
    given = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.steps_per_dispatch=3"]
    assert scaling.run(["experiments.cifar_cnn", *DIGITS, "--devices=1,2", "--dry_run", *given]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    configs = [flags.parse(EXPERIMENT, line.partition("experiments.cifar_cnn ")[2].split()).config for line in lines]
    assert [(config.mesh.data, config.mesh.fsdp) for config in configs] == [(-1, 1), *[(1, 2)] * 2, *[(-1, 1)] * 2]
    assert {config.steps_per_dispatch for config in configs} == {3}
