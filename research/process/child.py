"""Child processes that receive SIGTERM when their parent ends, even if it is killed."""

import functools
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

_VARIABLE = "MESHWORK_PARENT_PIPE"


@functools.cache
def _pipe() -> int:
    """Returns the read end of a pipe to which nobody writes: reading from it returns when this process has ended."""
    # The operating system closes the write end however the process ends, and child processes do not inherit it. Linux's
    # parent-death signal would also work, but macOS has none.
    return os.pipe()[0]


def start(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen:
    """Starts a command of this project that stops, as after SIGTERM, when this process ends.

    Args:
      command: the command.
      environment: all of its environment variables.
      **options: other arguments of `subprocess.Popen`.
    """
    pipe = _pipe()
    return subprocess.Popen(command, env={**environment, _VARIABLE: str(pipe)}, pass_fds=[pipe], **options)


def stop_with_parent() -> None:
    """Makes this process receive SIGTERM when its parent ends, if the parent started it with `start`."""
    # Removed, since this process's own children do not inherit the pipe.
    if pipe := os.environ.pop(_VARIABLE, ""):
        threading.Thread(target=_signal_at_end, args=(int(pipe),), daemon=True).start()


def _signal_at_end(pipe: int) -> None:
    os.read(pipe, 1)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)  # not os.kill, which would not interrupt a sleep of the main thread
