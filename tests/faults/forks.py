"""Runs in forks of one process that has imported everything: a start takes no time, and a death is a real one.

forks.run("experiments.cifar_cnn", [...], kill_after=2.5)     killed by SIGKILL after so many seconds
forks.run("drawn:run", [...], kill_at=17, watch=DIR)          killed before its 17th operation on files in DIR
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from research.data import cache

# What changes files, as `sys.addaudithook` names it; "open" too, where it is for writing.
_OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Forks:
    """The process that forks.

    Args:
      env: its environment, and that of all runs.
      folder: where they run, and where their output goes.
    """

    def __init__(self, env, folder):
        self.folder = folder
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, what, args, *, kill_after=None, kill_at=None, watch=""):
        """Returns the exit code (negative: the signal), the seconds, the operations on files in `watch`, the output."""
        job = {"what": what, "args": args, "kill_after": kill_after, "kill_at": kill_at, "watch": str(watch)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code, seconds, operations = json.loads(self._process.stdout.readline())
        return code, seconds, operations, (self.folder / "output").read_text()

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


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


def _child(job):
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    operations = []
    if job["watch"]:
        _watch(job["watch"], job["kill_at"], operations)
    code = 0
    try:
        module, _, function = job["what"].partition(":")
        module = importlib.import_module(module)
        if function:
            workdir, options = job["args"]
            getattr(module, function)(Path(workdir), **options)
        else:
            module.app.main(module.EXPERIMENT, job["args"], getattr(module, "run", module.app.run))
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    Path("operations").write_text(str(len(operations)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fill_cache(output):
    """Has a data set decoded, or finds it in the cache; writes what came."""
    pieces = [{"image": np.arange(i, i + 1000), "label": np.full(1000, i)} for i in range(3)]
    arrays = cache.load("entry", lambda: iter(pieces))
    output.write_text(str({name: int(array.sum()) for name, array in arrays.items()}))


def _serve():
    for name in ("cifar_cnn", "char_rnn", "mnist_vae", "cifar_speedrun"):
        importlib.import_module(f"experiments.{name}")
    for name in ("research.train", "research.distributed", "research.compilation_cache", "drawn"):
        importlib.import_module(name)
    for name in ("tensorboardX", "matplotlib.pyplot", "sklearn.datasets", "orbax.checkpoint.multihost"):
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        Path("operations").write_text("0")
        began = time.monotonic()
        if not (child := os.fork()):
            try:
                _child(job)
            finally:
                os._exit(1)
        if job["kill_after"] is not None:
            timer = threading.Timer(job["kill_after"], os.kill, (child, signal.SIGKILL))
            timer.start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if job["kill_after"] is not None:
            timer.cancel()
        print(json.dumps([code, time.monotonic() - began, int(Path("operations").read_text())]), flush=True)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))
    _serve()
