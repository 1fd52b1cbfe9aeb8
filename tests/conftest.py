"""Eight CPU devices for every test, and a cache folder that no test shares with its user."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
from compiling import QUICKLY

# Before jax starts, which the first test module that is imported may do; a worker has it from the process above it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("XLA_FLAGS", QUICKLY)
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    _CACHE = tempfile.TemporaryDirectory(prefix="meshwork-tests-")
    os.environ["MESHWORK_CACHE_DIR"] = _CACHE.name
    # Many tests compile the same program: half of the suite's time.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_CACHE.name}/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """What a file compiled goes with it, or the workers grow to gigabytes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def env(tmp_path, monkeypatch):
    """A machine without data and without network, one device, and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    changes = {
        "HOME": str(tmp_path),
        "KERAS_HOME": str(tmp_path / "keras"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "XLA_FLAGS": QUICKLY,
    }
    return {name: value for name, value in os.environ.items() if name != "TFDS_DATA_DIR"} | changes


@pytest.fixture
def stop(monkeypatch):
    """`stop(step, train)` runs `train(signals)` until it is at a step, where SIGTERM comes; returns its last words."""
    from research.process.signals import Signals, StoppedError
    from research.record import writer

    def stopped(step, train):
        signals = Signals()
        progress = writer.Writer.progress

        def seen(self, at, *args):
            progress(self, at, *args)
            if at >= step:
                signals.received = signal.SIGTERM

        monkeypatch.setattr(writer.Writer, "progress", seen)
        with pytest.raises(StoppedError) as error:
            train(signals)
        monkeypatch.setattr(writer.Writer, "progress", progress)
        assert error.value.exit_code == 143
        return str(error.value)

    return stopped
