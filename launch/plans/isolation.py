"""Plans one kind of chip in a separate process, so that a crash of its compiler does not end the other plans."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plan_in_subprocess(
    args: Sequence[str], topologies: Sequence[str], slices: int, folder: Path
) -> list[dict[str, Any]]:
    """Runs `launch.plan` for topologies of one kind of chip, without prices.

    Args:
      args: the experiment and its flags.
      topologies: their names, as in --topology.
      slices: as in --slices.
      folder: gets the record of the process.

    Returns:
      The entries of plan.json, in order. If the process failed, a line on stderr says so, and the rest are missing.
    """
    record = folder / "plan.json"
    record.unlink(missing_ok=True)
    flags = [f"--topology={','.join(topologies)}", f"--slices={slices}", f"--workdir={folder}"]
    command = [sys.executable, "-m", "launch.plan", *args, *flags]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    rows, code = _read(record), done.returncode
    # Otherwise it may have ended with an error only because a plan does not fit, which its row says.
    if len(rows) < len(topologies):
        print(done.stderr, end="", file=sys.stderr)
        end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        missing = ", ".join(topologies[len(rows) :])
        print(f"error: no plan of {missing}: the process that compiled it ended with {end}", file=sys.stderr)
    return rows


def _read(record: Path) -> list[dict[str, Any]]:
    if not record.exists():
        return []
    whole = json.loads(record.read_bytes())
    return whole.get("plans", [whole])
