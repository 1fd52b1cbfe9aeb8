"""Gives every test eight CPU devices, and cache folders other than the user's."""

import gc
import os
import signal
import tempfile
from pathlib import Path

import pytest
from compiling import QUICKLY

TESTS = Path(__file__).parent

# Set before the first test module imports jax. pytest-xdist's workers inherit the variables.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", QUICKLY)
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    _CACHE = tempfile.TemporaryDirectory(prefix="meshwork-tests-")
    os.environ["MESHWORK_CACHE_DIR"] = _CACHE.name
    # Many tests, and the processes they start, compile the same programs.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_CACHE.name}/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_collection_finish():
    """Collects garbage less often, and never what has been imported by now: 5% of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _clear_compiled_programs():
    """Frees a file's compiled programs when it ends: otherwise the workers grow to gigabytes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def env(tmp_path, monkeypatch):
    """The environment of a subprocess with one device, without data sets or network; changes to `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    changes = {
        "HOME": str(tmp_path),
        "KERAS_HOME": str(tmp_path / "keras"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "XLA_FLAGS": QUICKLY,
    }
    return {name: value for name, value in os.environ.items() if name != "TFDS_DATA_DIR"} | changes


@pytest.fixture
def stop(monkeypatch):
    """`stop(step, train)` runs `train(signals)`, sends SIGTERM at step `step` and returns the error's message."""
    from research.process.signals import Signals, StoppedError
    from research.record import writer

    def stop_at(step, train):
        signals = Signals()
        progress = writer.Writer.progress

        def signal_at_step(self, current, *args):
            progress(self, current, *args)
            if current >= step:
                signals.received = signal.SIGTERM

        monkeypatch.setattr(writer.Writer, "progress", signal_at_step)
        with pytest.raises(StoppedError) as error:
            train(signals)
        monkeypatch.setattr(writer.Writer, "progress", progress)
        assert error.value.exit_code == 143
        return str(error.value)

    return stop_at
