"""The doctor says what is there, and goes on where something is not."""

import subprocess
import sys

import jax

from research import doctor


def test_what_is_there_is_said(monkeypatch, capsys):
    monkeypatch.setenv("JAX_TEST_SETTING", "17")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.delitem(doctor._CHECKS, "two train steps")  # below, and slow
    assert doctor.run()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"jax {jax.__version__}" in lines
    assert "JAX_TEST_SETTING=17" in lines
    assert "7: cpu (cpu)" in lines
    assert any(line.startswith("cifar10: ") for line in lines)
    assert lines[-1] == "all is well"


def test_what_fails_is_named_and_the_rest_goes_on(env, tmp_path):
    env |= {"TFDS_DATA_DIR": str(tmp_path / "nowhere"), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "research.doctor"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert f"  FAILED: UserError: TFDS_DATA_DIR={tmp_path}/nowhere: no such folder" in done.stdout
    assert "1: cpu (cpu)" in done.stdout
    assert any(line.startswith("  loss 2.") for line in done.stdout.splitlines())
    assert "something failed" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr
