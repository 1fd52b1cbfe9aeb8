"""Pictures of runs, drawn from their metrics.jsonl, as matplotlib Figures."""

from collections.abc import Mapping, Sequence
from typing import Any

_SPLITS = {"train": "-", "validation": ":", "test": "--"}


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Draws loss and accuracy by epoch, a colour a run and a line style a split.

    Args:
      runs: the lines of metrics.jsonl, by the run's name.

    Returns:
      The Figure.
    """
    # Slow to import, and only wanted here. Not pyplot: a figure of its own needs no display and keeps no global state.
    from matplotlib.figure import Figure

    present = {name for lines in runs.values() for line in lines for name in line}
    metrics = [m for m in ("loss", "accuracy") if f"train_{m}" in present]
    figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for number, (run, lines) in enumerate(runs.items()):
            for split, style in _SPLITS.items():
                points = [(line["epoch"], line[f"{split}_{metric}"]) for line in lines if f"{split}_{metric}" in line]
                if points:
                    label = f"{run} {split}" if len(runs) > 1 else split
                    axes.plot(*zip(*points), style, marker=".", color=f"C{number}", label=label)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
