"""Runs `python -m experiments.cifar_cnn` in a subprocess or in this process, and checks its errors."""

import json
import subprocess
import sys

import pytest

from experiments import cifar_cnn
from research import app

COMMAND = [sys.executable, "-m", "experiments.cifar_cnn"]
QUICK = [
    "--config.num_epochs=1",
    "--config.model.width=4",
    "--config.batch_size=96",
    "--config.optimizer.name=momentum",  # the default takes twice as long to compile
]
DIGITS = ["--config.dataset.name=digits", *QUICK]


def run_command(env, *args, devices=1):
    """Runs the command in a subprocess."""
    env = env | {"XLA_FLAGS": f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    return subprocess.run([*COMMAND, *args], env=env, capture_output=True, text=True, timeout=240)


def run_here(args, capsys):
    """Runs a command that ends before training in this process, which is faster."""
    with pytest.raises(SystemExit) as exit_:
        app.main(cifar_cnn.EXPERIMENT, args)
    return subprocess.CompletedProcess(args, exit_.value.code, *capsys.readouterr())


def complains(done, *words):
    """Asserts exit code 2 and exactly one error line with all `words`, without a traceback."""
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert all(word in errors[0] for word in words)


def read_summary(workdir):
    """Returns the content of summary.json."""
    return json.loads((workdir / "summary.json").read_text())
