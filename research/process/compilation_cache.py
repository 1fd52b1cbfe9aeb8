"""Compiled programs, kept on disk: a program is compiled once, and loaded in about a second from then on.

JAX does it (https://docs.jax.dev/en/latest/persistent_compilation_cache.html); here is only where, and from what
compile time on. The folder may be deleted at any time. `JAX_ENABLE_COMPILATION_CACHE=false` turns it off, and
`JAX_COMPILATION_CACHE_DIR` names another.
"""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from research.data import cache

_SHORTEST_SECONDS = 0.2  # JAX's own is a second: many of a small network's programs take less, and add up


def enable() -> None:
    """Keeps compiled programs in the cache folder, unless it cannot be written or the user has named another to JAX."""
    folder = cache.folder() / f"xla-{_processor()}"
    with contextlib.suppress(OSError):  # without a cache everything works, only later
        folder.mkdir(parents=True, exist_ok=True)
        named = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if os.access(folder, os.W_OK) and named is None:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST_SECONDS)


def _processor() -> str:
    """Differs where instructions may be unknown: XLA compiles for the processor at hand, and a home folder travels."""
    abilities = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        abilities += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(abilities.encode()).hexdigest()[:8]
