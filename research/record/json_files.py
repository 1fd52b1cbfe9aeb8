"""Writes config.json, metrics.jsonl and summary.json."""

import json
import math
from pathlib import Path
from typing import Any

from research.record import storage
from research.record.output import Output

_METRICS = "metrics.jsonl"


def _encode(value: dict[str, Any], **options: Any) -> bytes:
    """Encodes a JSON object as one or more lines, with null for NaN and infinities, which JSON does not have."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    return json.dumps(finite, allow_nan=False, **options).encode() + b"\n"


def _parse_row(line: str) -> dict[str, Any] | None:
    """Returns a line of metrics.jsonl, or None if it is damaged."""
    try:
        row = json.loads(line)
        float(row["step"])
    except (ValueError, TypeError, KeyError):
        return None
    return row


def read_rows(workdir: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of metrics.jsonl before `step`, and the number of damaged lines; ignores an unfinished line."""
    path = workdir / _METRICS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    rows = [_parse_row(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row and row["step"] < step], rows.count(None)


class JsonFiles(Output):
    """The JSON files of a workdir. The methods raise `RecordError` if a file cannot be written.

    Args:
      workdir: an existing folder.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._metrics = storage.Log(workdir / _METRICS)

    def start(self, config: dict[str, Any], step: int, rows: list[dict[str, Any]]) -> None:
        """Writes config.json, and metrics.jsonl with these rows."""
        self._write("config.json", config)
        self._metrics.replace(b"".join(map(_encode, rows)))

    def scalars(self, row: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        self._metrics.append(_encode(row))

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, which marks the run as finished."""
        self.sync()
        self._write("summary.json", summary)

    def sync(self) -> None:
        """Returns once all lines are in metrics.jsonl."""
        self._metrics.sync()

    def close(self, failed: bool) -> None:
        """As `sync`."""
        self.sync()

    def _write(self, name: str, value: dict[str, Any]) -> None:
        storage.replace(self._workdir / name, _encode(value, indent=2))
