"""Where a benchmark's results go: the flag `--out`."""

import json
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


def merged(out: Path, name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `<name>.json` in the folder, and those measured anew in the place of others of equal `keys`."""
    path = out / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    return list({tuple(row[key] for key in keys): row for row in [*old, *rows]}.values())


def write(out: Path, name: str, record: Any) -> None:
    """Writes the record as `<name>.json` into the folder."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
