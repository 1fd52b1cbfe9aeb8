"""Summarizes the reports of the runs: rows for JSON and Markdown tables."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers.works import Work
from research.chips import of_device

Report = dict[str, Any]


def speed(work: Work, report: Report) -> float:
    """Computes examples (of text: tokens) per second, without the first epoch."""
    seconds = report["seconds"][1:]
    return work.batch_size * work.steps * work.units_per_example * len(seconds) / sum(seconds)


def line(work: Work, peer: str, report: Report) -> str:
    """Formats one run for the terminal."""
    return (
        f"{work.name}, batch {work.batch_size}, {work.dtype}: {peer:<14} {speed(work, report):>9,.0f} {work.unit}/s  "
        f"first step after {report['first_step_seconds']:.1f} s, peak {report['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"loss {report['losses'][0]:.4f}"
    )


def row(work: Work, peer: str, ours: list[Report], theirs: list[Report]) -> dict[str, Any]:
    """Compares this project with one peer.

    Raises:
      SystemExit: the losses differ by more than the work's tolerance, so they did not do the same work.
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
    device, rate = ours[0]["device"], statistics.median(mine)
    step_seconds = work.batch_size * work.units_per_example / rate
    return {
        "device": device,
        "work": work.name,
        "batch_size": work.batch_size,
        "dtype": work.dtype,
        "peer": peer,
        "unit": work.unit,
        "examples_per_second": round(rate, 1),
        "peer_examples_per_second": round(statistics.median(others), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "rounds": len(ratios),
        "flops_utilisation": utilization(device, work.dtype, ours[0]["step_flops"] / step_seconds),
        **{name: values[0] for name, values in medians.items()},
        **{f"peer_{name}": values[1] for name, values in medians.items()},
    }


def utilization(device: str, dtype: str, flops: float) -> float | None:
    """Returns `flops` (FLOP/s) as a fraction of the peak of this device; None if that is not known."""
    chip = of_device(device)
    return round(flops / chip.flops(dtype), 4) if chip and flops else None


_KEY = ("device", "work", "batch_size", "dtype", "peer")


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the file, with `rows` added or replaced."""
    old = json.loads(path.read_bytes()) if path.exists() else []
    by_key = {tuple(r[k] for k in _KEY): r for r in [*old, *rows]}
    return list(by_key.values())


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as tables for `benchmarks/README.md`: speed ratios, then time to the first step and memory.

    A cell of the first table has the median ratio and, in parentheses, the minimum and maximum over the rounds; a cell
    of the second has the seconds to the end of the first step and the peak memory in MiB.
    """

    def of_peak(part: float | None) -> str:
        return "" if part is None else f", {100 * part:.0f}% of peak"

    peers = list(dict.fromkeys(r["peer"] for r in rows))
    works: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        works.setdefault(f"{r['work']} | {r['batch_size']} | {r['dtype']}", []).append(r)

    def table(ours: Callable[[dict[str, Any]], str], theirs: Callable[[dict[str, Any]], str]) -> list[str]:
        names = ["work", "batch", "dtype", "this project", *peers]
        lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
        for work, group in works.items():
            cells = {r["peer"]: theirs(r) for r in group}
            shown = " | ".join(cells.get(peer, "-") for peer in peers)
            lines.append(f"| {work} | {ours(group[-1])} | {shown} |")
        return lines

    speeds = table(
        lambda r: f"{r['examples_per_second']:,.0f} {r['unit']}/s{of_peak(r['flops_utilisation'])}",
        lambda r: f"{r['ratio']:.2f} ({r['ratio_min']:.2f}, {r['ratio_max']:.2f})",
    )
    costs = table(
        lambda r: f"{r['first_step_seconds']:.1f} s, {r['peak_memory_bytes'] / 2**20:,.0f}",
        lambda r: f"{r['peer_first_step_seconds']:.1f} s, {r['peer_peak_memory_bytes'] / 2**20:,.0f}",
    )
    return "\n".join([*speeds, "", *costs])
