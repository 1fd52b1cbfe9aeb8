"""Plans of one kind of chip in a process of its own, so that a crash of its compiler ends no other plan."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.plans.topologies import Topology
from research.errors import UserError


def rows(args: Sequence[str], planned: Sequence[Topology]) -> list[dict[str, Any]]:
    """Plans topologies with the same kind of chip and number of slices in one child process, without prices.

    Args:
      args: of `launch.plan`: the experiment and its flags.
      planned: the topologies.

    Returns:
      The entries of plan.json, in order. If the process crashed, a line on stderr says so, and the rest are missing.

    Raises:
      UserError: the child process reported bad input.
    """
    shapes = ",".join(f"{one.chip.name}:{'x'.join(map(str, one.shape))}" for one in planned)
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--topology={shapes}", f"--slices={planned[0].slices}", f"--workdir={folder}/plan"]
        command = [sys.executable, "-m", "launch.plan", *args, *flags]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        found = _read(Path(folder, "plan", "plan.json"))
    if len(found) < len(planned):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode == UserError.exit_code:
            raise UserError(last.removeprefix("error: "))
        names = ", ".join(one.name for one in planned[len(found) :])
        print(f"error: no plan of {names}: the compiler's process ended with {_end(done.returncode)}", file=sys.stderr)
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    record = json.loads(path.read_bytes())
    return record.get("plans", [record])


def _end(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
