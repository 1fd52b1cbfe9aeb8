"""Where a benchmark's results go: the flag `--out`."""

import json
from collections.abc import Collection
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


def kept(out: Path, name: str, key: str, anew: Collection[str | int]) -> list[dict[str, Any]]:
    """The rows of `<name>.json` in the folder, but for those whose `key` is measured anew."""
    path = out / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row[key] not in anew]


def write(out: Path, name: str, record: Any) -> None:
    """Writes the record as `<name>.json` into the folder."""
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
