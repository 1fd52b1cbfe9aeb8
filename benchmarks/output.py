"""The results of benchmarks: JSON files in the folder `--out`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
from absl import flags

_OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results"), "folder of the results")


def folder() -> Path:
    """Returns the folder; exits with one line if it does not exist."""
    out = Path(os.path.expanduser(_OUT.value))
    if not out.is_dir():
        raise SystemExit(f"error: --out={out} is not a folder")
    return out


def merge(out: Path, name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Adds rows to `<name>.json`, replacing those with equal `keys`; returns all rows of the file."""
    path = out / f"{name}.json"
    old = json.loads(path.read_bytes())["rows"] if path.exists() else []
    rows = list({tuple(row[key] for key in keys): row for row in [*old, *rows]}.values())
    write(out, name, {"cores": joblib.cpu_count(), "rows": rows})
    return rows


def write(out: Path, name: str, record: Any) -> None:
    """Writes the record to `<name>.json` in the folder."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
