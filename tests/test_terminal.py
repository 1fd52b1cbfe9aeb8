"""Terminal output: closed pipes, encodings that lack characters, narrow and dumb terminals."""

import fcntl
import io
import os
import pty
import re
import runpy
import struct
import subprocess
import sys
import termios
from unittest import mock

import linear
import pytest
from command import COMMAND, DIGITS, read_summary
from drawn import run

from launch import job, local, predict
from research import app
from research.record import writer


@pytest.mark.slow
def test_a_run_survives_a_closed_stdout_and_stderr(env, tmp_path):
    """Both are a pipe whose reader has closed it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "linear", *DIGITS, "--workdir=x"], env=env, stdout=writer, stderr=writer, timeout=240
    )
    os.close(writer)
    assert done.returncode == 0
    assert read_summary(tmp_path / "x")["num_epochs"] == 1
    assert (tmp_path / "x/curves.png").exists()


@pytest.mark.parametrize(("command", "code"), [("--help | head -1", 0), ("--help >&-", 0), ("--nothing 2>&-", 2)])
def test_help_and_errors_survive_a_closed_output(command, code, env):
    shell = f"set -o pipefail; {' '.join(COMMAND)} {command}"
    done = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")


def _launch(*argv):
    with pytest.raises(SystemExit) as exit_, mock.patch("sys.argv", ["launch", *argv]):
        job.main(local.run)
    assert exit_.value.code == 0


def _run_module(module, *argv):
    with mock.patch("sys.argv", [module, *argv]), mock.patch.dict(sys.modules):
        sys.modules.pop(module, None)  # runpy warns of a module that another test has imported
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize(
    "command",
    [
        lambda workdir: app.main(linear.EXPERIMENT, [f"--workdir={workdir}"]),
        lambda workdir: _launch("linear", f"--workdir=new/{workdir}", "--dry_run"),
        lambda workdir: _run_module("research.compare", workdir),
        lambda workdir: predict.main([workdir]),
    ],
    ids=["an experiment", "a launcher", "compare", "predict"],
)
def test_a_character_that_stdout_cannot_encode_is_escaped(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "läuft"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    (workdir / "metrics.jsonl").touch()
    # Replaces what is slow and does not matter here.
    monkeypatch.setattr(app, "run", lambda experiment, argv, signals: print(argv))
    monkeypatch.setattr(predict, "run", lambda argv: print(argv))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as with PYTHONIOENCODING=ascii
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        command("läuft")
    stream.flush()
    assert r"l\xe4uft" in stream.buffer.getvalue().decode("ascii")


def test_a_benchmark_runs_where_output_is_ascii(env):
    command = [sys.executable, "-c", "from benchmarks import command; command.start(lambda: print('läuft'))"]
    done = subprocess.run(command, env=env | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "l\\xe4uft\n")


@pytest.fixture
def terminal(monkeypatch):
    """Runs the tiny experiment with stderr on a pseudo-terminal of a given width; returns the output."""

    def run_in_terminal(workdir, columns, **options):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with open(theirs, "w") as stream:
            monkeypatch.setattr("sys.stderr", stream)
            run(workdir, **options)
            stream.flush()
            os.set_blocking(ours, False)
            text = b""
            try:
                while part := os.read(ours, 65536):
                    text += part
            except BlockingIOError:
                pass
        os.close(ours)
        return text.decode()

    return run_in_terminal


@pytest.mark.parametrize("columns", [40, 120])
def test_the_bar_fits_the_terminal(columns, terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    lines = re.split(r"[\r\n]+", terminal(tmp_path / "x", columns, steps_per_dispatch=1))
    bars = [line for line in lines if re.search(r"22/22 .*loss \d\.\d{4}", line)]
    assert bars
    assert all(len(line) <= columns for line in lines)
    assert ("examples/s" in bars[-1]) == (columns == 120)


def test_a_dumb_terminal_gets_no_bar(terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert terminal(tmp_path / "x", 80) == ""


def test_the_time_left_counts_from_where_training_began_or_went_back_to(monkeypatch, tmp_path, capsys):
    """Not from before compiling, and after a rewind not from before that."""
    clock = [0.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: clock[0])
    with writer.Writer(tmp_path, 1000, active=True) as record:
        clock[0] = 3600.0  # an hour of compiling
        record.resume(0, {})
        clock[0] += 1.0
        record.progress(5, 1.0, 1.0)  # too soon for a line
        clock[0] += 19.0
        record.progress(100, 1.0, 1.0)
        record.resume(50, {})
        clock[0] += 20.0
        record.progress(100, 1.0, 1.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert [line.split()[-2] for line in lines] == ["03:00", "06:00"]
