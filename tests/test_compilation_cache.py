"""The persistent compilation cache: a second process loads what the first compiled."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax
from research.process import compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
compilation_cache._SHORTEST_SECONDS = 0.0
compilation_cache.enable()
value = jax.jit(lambda x: x * 3)(14.0)
print(int(value), sum(hits), jax.config.jax_compilation_cache_dir)
"""


def _run(env, **changes):
    env = {name: value for name, value in env.items() if not name.startswith("JAX_COMPILATION")} | changes
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_compiled_once_then_loaded(env, tmp_path):
    cache = {"MESHWORK_CACHE_DIR": str(tmp_path / "cache")}
    first, second = _run(env, **cache), _run(env, **cache)
    assert first[:2] == ["42", "0"]
    assert second[0] == "42"
    assert int(second[1]) > 0
    assert second[2].startswith(str(tmp_path / "cache/xla-"))
    named = _run(env, **cache, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert named == ["42", "0", str(tmp_path / "mine")]  # JAX_COMPILATION_CACHE_DIR takes precedence
    (tmp_path / "file").touch()
    assert _run(env, MESHWORK_CACHE_DIR=str(tmp_path / "file")) == ["42", "0", "None"]  # not writable: no cache
