"""The doctor reports what it finds, and continues after a failed check."""

import subprocess
import sys

import jax
import pytest

from research import doctor
from research.config import DatasetConfig
from research.data import sources
from research.training import loop


def test_versions_settings_and_devices_are_reported(monkeypatch, capsys):
    monkeypatch.setenv("JAX_TEST_SETTING", "17")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.delitem(doctor._CHECKS, "two train steps")  # slow; tested below
    assert doctor.run()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"jax {jax.__version__}" in lines
    assert "JAX_TEST_SETTING=17" in lines
    assert "7: cpu (cpu)" in lines
    assert any(line.startswith("cifar10: ") for line in lines)
    assert lines[-1] == "all checks passed"


def test_two_steps_leave_the_embedded_data_set_as_it_was(monkeypatch):
    datasets = []

    def train_and_evaluate(experiment, config, task, dataset, mesh, workdir):
        datasets.append(dataset)
        return None, {"train_loss": 2.0, "compile_seconds": 1.0}

    monkeypatch.setattr(loop, "train_and_evaluate", train_and_evaluate)
    (line,) = doctor._two_steps()
    assert line.startswith("loss 2.0000")
    assert len(datasets[0].train["label"]) == 2 * 8 * jax.device_count()
    assert len(sources.load(DatasetConfig(name="digits")).train["label"]) == 1437


@pytest.mark.slow
def test_a_failed_check_is_reported_and_the_others_run(env, tmp_path):
    env |= {"TFDS_DATA_DIR": str(tmp_path / "nowhere"), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "research.doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert f"  FAILED: UserError: TFDS_DATA_DIR={tmp_path}/nowhere: no such folder" in done.stdout
    assert "1: cpu (cpu)" in done.stdout
    assert any(line.startswith("  loss 2.") for line in done.stdout.splitlines())
    assert "a check failed" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr
