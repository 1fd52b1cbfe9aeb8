"""Settings of JAX and XLA with which nothing can run are reported in one line, before data is loaded."""

import subprocess
import sys

import jax
import linear
import pytest
from command import DIGITS, complains

from launch import sweep
from research import app
from research.data import sources
from research.errors import UserError
from research.process import backend


def test_a_platform_without_devices_is_named(env, tmp_path):
    command = [sys.executable, "-m", "linear", *DIGITS, "--workdir=x"]
    done = subprocess.run(command, env=env | {"JAX_PLATFORMS": "cpuu"}, capture_output=True, text=True, timeout=240)
    complains(done, "JAX_PLATFORMS=cpuu: JAX finds no such device", "set JAX_PLATFORMS=cpu")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def platforms():
    """JAX_PLATFORMS=cuda."""
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", "cuda")
    yield
    jax.config.update("jax_platforms", before)


def _raising(error):
    def raises(*_):
        raise error

    return raises


@pytest.mark.parametrize("error", [RuntimeError("no device"), AssertionError()])
@pytest.mark.parametrize(
    "run",
    [
        lambda: app.run(linear.EXPERIMENT, [*DIGITS, "--workdir=x"]),
        lambda: sweep.run(["linear", *DIGITS, "--workdir=x", "--search=label_smoothing=[0,0.1]"]),
    ],
    ids=["experiment", "sweep"],
)
def test_it_is_found_before_data_is_loaded(run, error, platforms, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", _raising(error))
    monkeypatch.setattr(sources, "load", lambda _: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"no such device \(no device\)" if str(error) else "plugin is not installed"):
        run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", ["UNAVAILABLE: device busy", "DEADLINE_EXCEEDED: a host is missing"])
def test_a_device_that_is_busy_is_not_bad_input(status, platforms, monkeypatch):
    """Launchers retry all but bad input."""
    monkeypatch.setattr(jax, "devices", _raising(RuntimeError(status)))
    with pytest.raises(RuntimeError, match=status):
        backend.check()


@pytest.mark.parametrize("flags", ["--xla_nonsense=1", "--xla_force_host_platform_device_count=many", "no_such_file"])
def test_xla_flags_that_xla_does_not_accept_are_named(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x {flags}" if flags.startswith("--") else flags)
    value = flags.partition("=")[2] or flags
    with pytest.raises(UserError, match=f"^XLA_FLAGS=.*{flags}: this jaxlib does not accept it .*{value}"):
        backend.check_xla_flags()


def test_xla_flags_are_tried_once(monkeypatch, tmp_path):
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    backend.check_xla_flags()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("tried again"))
        backend.check_xla_flags()
        patch.delenv("XLA_FLAGS")
        backend.check_xla_flags()
