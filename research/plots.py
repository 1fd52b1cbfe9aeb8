"""Plots as matplotlib Figures: training curves, scaling, and the predictions and samples of trained networks.

matplotlib is slow to import, so each function imports it. `Figure` is used instead of pyplot: it needs no display and
has no global state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_SPLITS = {"train": "-", "validation": ":", "test": "--"}


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Plots loss and accuracy by epoch, with a color for each run and a line style for each split.

    Args:
      runs: the lines of metrics.jsonl, by the run's name.

    Returns:
      The Figure.
    """
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


def scaling(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Plots speed and efficiency by number of devices, from the rows of scaling.json; dotted: linear scaling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    devices = [row["devices"] for row in rows]
    rates = [row["examples_per_second"] for row in rows]
    left.plot(devices, rates, "o-")
    left.plot(devices, [rates[0] * count / devices[0] for count in devices], "k:")
    left.set(xlabel="devices", ylabel="examples a second")
    low, high = ([row[f"efficiency_{end}"] for row in rows] for end in ("min", "max"))
    right.plot(devices, [row["efficiency"] for row in rows], "o-")
    right.fill_between(devices, low, high, alpha=0.2)
    right.axhline(1.0, color="k", linestyle=":")
    right.set(xlabel="devices", ylabel=f"efficiency, {rows[0]['mode']} scaling", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(devices)
        axes.grid(alpha=0.3)
    return figure


def plan(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Plots estimated step time and efficiency by number of chips, from the rows of plan.json that fit in memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fitting = [row for row in rows if row["fits"]]
    for name in dict.fromkeys(row.get("strategy", "plan") for row in fitting):
        matching = [row for row in fitting if row.get("strategy", "plan") == name]
        style = "o-" if "strategy" in matching[0] else "o"
        left.plot(*zip(*((row["num_chips"], row["step_seconds"] * 1e3) for row in matching)), style, label=name)
        efficiencies = [(row["num_chips"], row["scaling_efficiency"]) for row in matching]
        if known := [(chips, efficiency) for chips, efficiency in efficiencies if efficiency is not None]:
            right.plot(*zip(*known), style, label=name)
    left.set(xlabel="chips", ylabel="milliseconds a step, estimated", yscale="log")
    right.set(xlabel="chips", ylabel="efficiency, estimated", ylim=(0, 1.1))
    right.axhline(1.0, color="k", linestyle=":")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def confusion(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> Any:
    """Plots the confusion matrix: label by row, prediction by column, colored by the fraction of the row.

    Args:
      labels, predictions: int [n].
      names: the class names.
    """
    from matplotlib.figure import Figure

    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    side = max(4.0, 0.55 * len(names) + 1.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="label", title=f"accuracy {np.trace(counts) / len(labels):.4f}")
    if len(names) <= 20:  # illegible for more
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize="x-small", color=color)
    return figure


def mistakes(images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]) -> Any:
    """Plots the 25 most confidently misclassified examples, most confident first.

    Args:
      images: uint8 [n, h, w, c], c 1 or 3.
      labels: int [n].
      probabilities: float [n, classes].
      names: the class names.
    """
    from matplotlib.figure import Figure

    predictions, confidence = probabilities.argmax(-1), probabilities.max(-1)
    wrong = np.flatnonzero(predictions != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:25]
    rows = max(-(-len(wrong) // 5), 1)
    figure = Figure(figsize=(9, 2 * rows + 0.5), layout="constrained")
    axes = figure.subplots()  # one for all images: laying out 25 takes a second
    axes.set_title(f"{(predictions != labels).sum():,} mistakes of {len(labels):,}: label, prediction (probability)")
    for number, i in enumerate(wrong.tolist()):
        row, column = divmod(number, 5)
        left, bottom = 1.2 * column, 1.2 * (rows - row)
        axes.imshow(images[i].squeeze(), cmap="gray", vmin=0, vmax=255, extent=(left, left + 1, bottom, bottom + 1))
        label, prediction = names[int(labels[i])], names[int(predictions[i])]
        text = f"{label}, {prediction} ({confidence[i]:.2f})"
        axes.text(left + 0.5, bottom + 1.02, text, ha="center", va="bottom", fontsize="x-small")
    axes.set(xlim=(-0.1, 6.0), ylim=(1.1, 1.2 * rows + 1.2))
    axes.axis("off")
    return figure


def image_grid(images: np.ndarray, columns: int, title: str) -> Any:
    """Plots a grid of images, row by row, separated by white lines.

    Args:
      images: float [n, h, w, c] in 0..1, c 1 or 3.
      columns: images in a row.
      title: title of the plot.
    """
    from matplotlib.figure import Figure

    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.ones((rows * columns, height + 1, width + 1, channels), np.float32)
    cells[:count, :height, :width] = images
    cells = cells.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
    tiled = cells.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    figure = Figure(figsize=(7, 7 * tiled.shape[0] / tiled.shape[1] + 0.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(tiled.squeeze(-1) if channels == 1 else tiled, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize="medium")
    axes.axis("off")
    return figure


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Plots points in the plane, colored by label.

    Args:
      points: float [n, 2].
      labels: int [n].
      names: the label names.
      title: title of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for label, name in enumerate(names):
        axes.scatter(*points[labels == label].T, s=3, label=name)
    axes.set_title(title, fontsize="medium")
    axes.legend(markerscale=4, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scaling_law(found: Mapping[str, Any]) -> Any:
    """Plots measurements by size, their fitted power law and its extrapolation (`found`: see `launch.sweeps.fit`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes, values = zip(*found["points"])
    beyond = found["beyond"]
    line = np.geomspace(min(sizes), beyond[-1]["size"], 200)
    axes.plot(line, found["floor"] + found["factor"] * line ** -found["exponent"], "k-", linewidth=1, label="law")
    axes.plot(sizes, values, "o", label="measured")
    for row, color, label in [*((row, "C1", "expected, 95%") for row in beyond), (found.get("largest"), "C2", None)]:
        if row:
            bars = [[row["expected"] - row["low"]], [row["high"] - row["expected"]]]
            name = label or "largest, from the smaller ones"
            axes.errorbar([row["size"]], [row["expected"]], bars, fmt="s", capsize=4, color=color, label=name)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(*zip(*dict(zip(labels, zip(handles, labels))).values()), fontsize="small")
    axes.set(xlabel=found["by"], ylabel=found["figure"], xscale="log")
    axes.grid(alpha=0.3)
    return figure
