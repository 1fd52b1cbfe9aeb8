"""A command of Python in a process of its own, as the comparisons run it."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


def run(name: str, args: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What `python ARGS` prints, its environment this one's and more.

    Raises:
      SystemExit: it failed; with `name` and the last line of its stderr.
    """
    done = subprocess.run(
        [sys.executable, *args], env=os.environ | dict(environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["in silence"])[-1]
        raise SystemExit(f"error: {name} failed: {last}")
    return done.stdout
