"""What the runs' reports amount to: rows of figures, as JSON and as a table."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers.works import Work

Report = dict[str, Any]


def speed(work: Work, report: Report) -> float:
    """Examples (an LSTM's: tokens) a second after the first epoch."""
    seconds = report["seconds"][1:]
    return work.batch_size * work.steps * work.units_per_example * len(seconds) / sum(seconds)


def line(work: Work, peer: str, report: Report) -> str:
    """One run, as the terminal shows it."""
    return (
        f"{work.name}, batch {work.batch_size}, {work.dtype}: {peer:<14} {speed(work, report):>9,.0f} {work.unit}/s  "
        f"first step after {report['first_step_seconds']:.1f} s, peak {report['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"loss {report['losses'][0]:.4f}"
    )


def row(work: Work, peer: str, ours: list[Report], theirs: list[Report]) -> dict[str, Any]:
    """This project against one peer.

    Raises:
      SystemExit: the losses differ by more than the work's tolerance: it was not the same work.
    """
    for mine, other in zip(ours, theirs):
        a, b = mine["losses"][0], other["losses"][0]
        if abs(a - b) > work.tolerance * abs(b):
            raise SystemExit(f"error: {work.name} with {peer} is not the same work: losses {a:.4f} here, {b:.4f} there")
    mine, others = ([speed(work, report) for report in reports] for reports in (ours, theirs))
    ratios = [a / b for a, b in zip(mine, others)]
    medians = {
        name: [statistics.median(report[name] for report in reports) for reports in (ours, theirs)]
        for name in ("first_step_seconds", "peak_memory_bytes")
    }
    return {
        "work": work.name,
        "batch_size": work.batch_size,
        "dtype": work.dtype,
        "peer": peer,
        "unit": work.unit,
        "examples_per_second": round(statistics.median(mine), 1),
        "peer_examples_per_second": round(statistics.median(others), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "rounds": len(ratios),
        **{name: values[0] for name, values in medians.items()},
        **{f"peer_{name}": values[1] for name, values in medians.items()},
    }


_KEY = ("work", "batch_size", "dtype", "peer")


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the file, those measured anew replaced."""
    old = json.loads(path.read_text()) if path.exists() else []
    by_key = {tuple(r[k] for k in _KEY): r for r in [*old, *rows]}
    return list(by_key.values())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for README."""
    lines = [
        "| work | batch | dtype | peer | this project | peer | ratio (spread) | first step, s | peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        mib = [f"{r[name] / 2**20:,.0f}" for name in ("peak_memory_bytes", "peer_peak_memory_bytes")]
        lines.append(
            f"| {r['work']} | {r['batch_size']} | {r['dtype']} | {r['peer']} | {r['examples_per_second']:,.0f} "
            f"{r['unit']}/s | {r['peer_examples_per_second']:,.0f} | **{r['ratio']:.2f}** ({r['ratio_min']:.2f} to "
            f"{r['ratio_max']:.2f}) | {r['first_step_seconds']:.1f}, {r['peer_first_step_seconds']:.1f} | "
            f"{mib[0]}, {mib[1]} |"
        )
    return "\n".join(lines)
