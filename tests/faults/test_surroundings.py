"""No memory, no home folder, an unusual clock or locale: the run works, or one line says what does not.

Terminals are tested in test_terminal.py: a closed stdout, `| head -1`, TERM=dumb, 40 columns.
"""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time

import pytest
from command import COMMAND, DIGITS, complains, read_summary
from drawn import read_lines, run

from research.errors import OutOfMemoryError, UserError, as_out_of_memory_error
from research.record.workdir import Workdir

pytestmark = pytest.mark.faults


SECRETS = {"GOOGLE_APPLICATION_TOKEN": "s3cr3t-1", "AWS_SECRET_ACCESS_KEY": "s3cr3t-2", "JAX_API_TOKEN": "s3cr3t-3"}


@pytest.fixture
def bare(env):
    """An environment without a home folder, in an ASCII locale that Python may not replace by UTF-8."""
    names = ("PATH", "PYTHONPATH", "MESHWORK_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR", "HTTPS_PROXY")
    odd = {"HOME": "/nonexistent", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return {name: env[name] for name in names} | odd


@pytest.mark.slow
def test_without_a_home_folder_or_utf_8_and_without_leaking_secrets(bare, tmp_path):
    args = [*DIGITS, "--config.batch_size=512", "--workdir=x"]
    command = [sys.executable, "-m", "linear", *args]
    done = subprocess.run(command, env=bare | SECRETS, cwd=tmp_path, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / "x")["num_epochs"] == 1
    written = [path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(b"s3cr3t" in text for text in (*written, done.stdout, done.stderr))


@pytest.mark.slow
def test_a_workdir_name_outside_the_locale_is_an_error(bare, tmp_path):
    args = [*DIGITS, "--workdir=ordner-\u00fc"]
    done = subprocess.run([*COMMAND, *args], env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    complains(done, "set LC_ALL=C.UTF-8")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_clock_that_jumps_back_a_day_at_every_reading(stop, tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    readings = iter(range(10**9))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86400 * next(readings))
    stop(15, lambda signals: run(tmp_path / "x", signals=signals, steps_per_dispatch=1))
    _, summary = run(tmp_path / "x")
    assert read_lines(tmp_path / "x") == read_lines(tmp_path / "whole")
    assert all(summary[name] > 0 for name in ("train_seconds", "wall_seconds", "examples_per_second"))
    assert whole.step == 22


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(number, monkeypatch, tmp_path):
    """A second run is refused; a lock of a killed run of this machine is taken over, another machine's is named."""

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    holder = tmp_path / "x/.lock-holder"
    with Workdir(tmp_path / "x"):
        written = holder.read_text()
        owner, token = written.splitlines()
        assert owner == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(UserError, match=rf"x is in use by {owner}: give another .* or delete {holder} if"):
            Workdir(tmp_path / "x").__enter__()
        assert holder.read_text() == written
        (tmp_path / "x/config.json").write_text("{}")
    assert not holder.exists()
    with subprocess.Popen(["true"]) as ended:
        pass
    before_the_restart = f"{owner}\n{token[::-1]}"  # of a container, in which the process has the same number again
    for left in (written.replace(str(os.getpid()), str(ended.pid)), before_the_restart):
        holder.write_text(left)
        with Workdir(tmp_path / "x"):
            assert holder.read_text() == written
    holder.write_text(f"process {ended.pid} on another")
    with pytest.raises(UserError, match="or delete"):
        Workdir(tmp_path / "x").__enter__()


@pytest.mark.slow
def test_out_of_memory_names_the_fields_to_lower(forks, tmp_path):
    """With a limit on the address space: the allocation fails in XLA, not in Python."""
    args = ["--config.dataset.name=digits", "--config.num_epochs=1", "--config.samples=500"]
    args += ["--config.batch_size=1024", f"--workdir={tmp_path / 'x'}"]
    ended = forks.run("experiments.mnist_vae", args, limits={"AS": 1_500_000_000})
    assert ended.code == 5, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line
    assert "lower --config.microbatch_size" in line
    assert "--config.batch_size" in line
    assert "Traceback" not in ended.output


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
        RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 46592929092 bytes."),
    ],
)
def test_errors_that_mean_out_of_memory(error):
    found = as_out_of_memory_error(error)
    assert isinstance(found, OutOfMemoryError)
    assert found.exit_code == 5
    assert as_out_of_memory_error(RuntimeError("INTERNAL: something else")) is None


def test_doctor_shows_no_token(monkeypatch, capsys):
    from research import doctor

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    print("\n".join(doctor._settings()))
    output = capsys.readouterr().out
    assert "JAX_API_TOKEN=(not shown)" in output
    assert "s3cr3t" not in output
    assert f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}" in output
