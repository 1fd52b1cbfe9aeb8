"""Enables JAX's persistent compilation cache, so that a program is compiled once and later loaded in about a second.

This module only chooses the folder and the shortest compile time that is cached; see
https://docs.jax.dev/en/latest/persistent_compilation_cache.html. The folder may be deleted at any time.
`JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off, and `JAX_COMPILATION_CACHE_DIR` names another folder.
"""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from research.data import cache

_SHORTEST_SECONDS = 0.2  # JAX's default is 1 s, but a small network has many faster programs, which add up


def enable() -> None:
    """Turns the cache on, unless the folder is not writable or the user has configured another one."""
    folder = cache.folder() / f"xla-{_cpu_fingerprint()}"
    with contextlib.suppress(OSError):  # without a cache everything works, but starts more slowly
        folder.mkdir(parents=True, exist_ok=True)
        configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if os.access(folder, os.W_OK) and configured is None:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST_SECONDS)


def _cpu_fingerprint() -> str:
    """Returns a hash of the CPU's instruction set."""
    # XLA:CPU compiles for the CPU it runs on, and machines with different CPUs may share a home folder.
    features = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:8]
