"""Runs training in forks of one process that has imported everything: quick to start, and safe to kill.

forks.run("experiments.cifar_cnn", [...], kill_after=2.5)     killed by SIGKILL after so many seconds
forks.run("drawn:run", [...], kill_at=17, watch=DIR)          killed before its 17th operation on files in DIR
forks.run("experiments.cifar_cnn", [...], send=[15, FILE])    gets SIGTERM once FILE exists
"""

import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from research.data import cache
from research.training import loop

# Audit events (`sys.addaudithook`) that change files; "open" counts too, if for writing.
_OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
_TIMEOUT = 600  # seconds after which SIGALRM ends a run that hangs
_IMPORTED = [f"experiments.{name}" for name in ("cifar_cnn", "char_rnn", "mnist_vae", "cifar_speedrun")]
_IMPORTED += [
    "research.process.distributed",
    "research.process.compilation_cache",
    "drawn",
    "linear",
    "tensorboardX",
    "matplotlib.pyplot",
]
_IMPORTED += ["sklearn.datasets", "orbax.checkpoint.multihost"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
      code: exit code; if negative, the signal that killed it.
      seconds: wall time.
      operations: number of operations on files in `watch`, unless it was killed.
      output: its stdout and stderr.
    """

    code: int
    seconds: float
    operations: int
    output: str


class Forks:
    """The parent process that forks.

    Args:
      env: environment of the process and of all runs.
      folder: their working directory, which also receives their output.
    """

    def __init__(self, env, folder):
        self.folder = folder
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, what, args, **job):
        """Runs an experiment, or a function `module:name` with a folder and its options.

        Args:
          what: "experiments.cifar_cnn", "drawn:run".
          args: flags of the experiment, or [folder, options] of the function.
          job: `kill_after`, `kill_at`, `send`, `watch` as above; `plots`: whether to draw plots, which takes half of
            a small run's time; `limits`: {"AS": bytes beyond current use, "FSIZE": bytes}, as in `ulimit`.
        """
        self._process.stdin.write(json.dumps({"what": what, "args": args, **job}, default=str) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"The process that forks ended with {self._process.wait()}, see stderr.")
        code, seconds, operations = json.loads(line)
        return Ended(code, seconds, operations, (self.folder / "output").read_text())

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def fill_cache(output):
    """Loads a data set through the cache and writes the sums of its arrays."""
    pieces = [{"image": np.arange(i, i + 1000), "label": np.full(1000, i)} for i in range(3)]
    arrays = cache.load("entry", lambda: iter(pieces))
    output.write_text(str({name: int(array.sum()) for name, array in arrays.items()}))


def _watch(folder, kill_at, counter):
    def hook(event, args):
        if event == "open":
            if not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in _OPERATIONS:
            return
        if str(args[0]).startswith(folder):
            counter.append(1)
            if len(counter) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _limit(limits):
    for name, value in limits.items():
        if name == "AS":
            value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _child(job, counted):
    """Runs the job; writes the number of its operations to the file descriptor `counted`, at once or not at all."""
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(_TIMEOUT)
    if not job.get("plots"):
        loop.Loop.draw = lambda _: None
    _limit(job.get("limits", {}))
    operations = []
    if job.get("watch"):
        _watch(job["watch"], job.get("kill_at"), operations)
    code = 0
    try:
        module, _, function = job["what"].partition(":")
        module = importlib.import_module(module)
        if function:
            folder, options = job["args"]
            getattr(module, function)(Path(folder), **options)
        else:
            module.app.main(module.EXPERIMENT, job["args"])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    os.write(counted, b"%d" % len(operations))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _send_signal(child, job, over):
    """Sends the signal at its time, unless the run is over."""
    number, path = job.get("send") or (signal.SIGKILL, "")
    if path:
        while not over.is_set() and not os.path.exists(path):
            time.sleep(0.005)
    elif over.wait(job["kill_after"]):
        return
    if not over.is_set():
        os.kill(child, number)


def _serve():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under `nohup pytest`
    for name in _IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        count, counted = os.pipe()
        began, over = time.monotonic(), threading.Event()
        if not (child := os.fork()):
            try:
                _child(job, counted)
            finally:
                os._exit(1)
        os.close(counted)
        if job.get("kill_after") is not None or job.get("send"):
            threading.Thread(target=_send_signal, args=(child, job, over)).start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        over.set()
        with open(count) as file:
            print(json.dumps([code, time.monotonic() - began, int(file.read() or 0)]), flush=True)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    _serve()
