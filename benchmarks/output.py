"""Where a benchmark's results go: the flag `--out`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

_OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results"), "folder of the results")


def folder() -> Path:
    """The folder; ends the process with one line where it is none."""
    out = Path(_OUT.value)
    if not out.is_dir():
        raise SystemExit(f"error: --out={out} is not a folder")
    return out


def merge(out: Path, name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Puts rows into `<name>.json` in the folder, in the place of others of equal `keys`; returns all that it has."""
    path = out / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = list({tuple(row[key] for key in keys): row for row in [*old, *rows]}.values())
    write(out, name, {"cores": os.cpu_count(), "rows": rows})
    return rows


def write(out: Path, name: str, record: Any) -> None:
    """Writes the record as `<name>.json` into the folder."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
