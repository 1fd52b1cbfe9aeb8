"""Checks that JAX can start with the settings of the environment, before data is loaded."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import version

import jax

from research.data import cache
from research.errors import UserError, as_out_of_memory_error
from research.process import xla_flags

# Statuses of devices that are busy or whose host was preempted. A launcher retries then, but not after bad input.
_TRANSIENT_STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "INTERNAL")


def check() -> None:
    """Checks the XLA flags and initializes JAX's devices.

    Raises:
      UserError: XLA does not accept the flags, or JAX_PLATFORMS names a platform that has no devices here.
    """
    check_xla_flags()
    try:
        jax.devices()
    except Exception as error:  # RuntimeError; AssertionError without a text if the platform's plugin is missing
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        if not platforms or as_out_of_memory_error(error) or any(words in str(error) for words in _TRANSIENT_STATUSES):
            raise
        why = str(error).partition(" (set JAX_PLATFORMS")[0][:200] or "its plugin is not installed"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: JAX finds no such device ({why}): unset it, or set JAX_PLATFORMS=cpu"
        ) from None


def check_xla_flags() -> None:
    """Checks the user's XLA flags; initializes no devices.

    Raises:
      UserError: this jaxlib does not accept them.
    """
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in xla_flags.FLAGS)
    if not flags:
        return
    # XLA ends the process at a flag that it cannot parse, so another process tries them: once, as it takes 0.3 s.
    digest = hashlib.sha256(f"{version('jaxlib')} {flags}".encode()).hexdigest()[:16]
    accepted = cache.folder() / f"xla-flags-{digest}"
    if os.path.exists(accepted):  # unlike Path.exists, False if the folder may not be searched
        return
    command = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode and (reason := re.search(r"\.cc:\d+\] (.+)", done.stderr)):
        raise UserError(f"XLA_FLAGS={flags}: this jaxlib does not accept it ({reason[1]}): correct or remove the flag")
    with contextlib.suppress(OSError):
        accepted.parent.mkdir(parents=True, exist_ok=True)
        accepted.touch()
