"""The main command, as the tests run it."""

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
    """The command in a process of its own."""
    env = env | {"XLA_FLAGS": f"{env['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    return subprocess.run([*COMMAND, *args], env=env, capture_output=True, text=True, timeout=240)


def run_here(args, capsys):
    """The command in this process: quicker, for what ends before it trains."""
    with pytest.raises(SystemExit) as exit_:
        app.main(cifar_cnn.EXPERIMENT, args)
    return subprocess.CompletedProcess(args, exit_.value.code, *capsys.readouterr())


def complains(done, *words):
    """One line that says what was wrong, exit code 2, no traceback."""
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    assert all(word in errors[0] for word in words)


def read_summary(workdir):
    """What summary.json holds."""
    return json.loads((workdir / "summary.json").read_text())
