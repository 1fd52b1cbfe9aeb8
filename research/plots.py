"""Plots as matplotlib Figures: training curves, scaling, and the predictions and samples of trained networks.

Their size, memory and time are bounded for any number of classes, runs and examples (`research.record.drawing`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.record import drawing

_MAX_CLASSES = 30  # that one plot can distinguish
_MAX_RUNS = 20
_MAX_LINE_POINTS, _MAX_DOTS = 2_000, 20_000
_MAX_PIXELS = 2_400  # width and height of an image grid; more are lost in the drawing
_SPLITS = {"train": "-", "validation": ":", "test": "--"}


def _thin(points: Any, most: int) -> Any:
    """Returns about `most` evenly spaced elements of a sequence, including the last."""
    step = max(-(-len(points) // most), 1)
    return points[::-step][::-1]


def _colors(count: int) -> list[Any]:
    """Returns a color for each of `count` classes or runs; matplotlib's cycle has only ten."""
    from matplotlib import colormaps

    return [f"C{i}" for i in range(count)] if count <= 10 else list(colormaps["turbo"](np.linspace(0, 1, count)))


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Plots loss and accuracy by epoch, with a color for each run and a line style for each split.

    Args:
      runs: the lines of metrics.jsonl, by the run's name. Only the first 20 runs that have finished an epoch are drawn.

    Returns:
      The Figure.
    """
    measured = {run: lines for run, lines in runs.items() if any("train_loss" in line for line in lines)}
    shown = dict(list(measured.items())[:_MAX_RUNS])
    present = {name for lines in shown.values() for line in lines for name in line}
    metrics = [m for m in ("loss", "accuracy") if f"train_{m}" in present]
    width = 5.5 * len(metrics)
    figure = drawing.figure(width + 4, 0.5 * len(shown) + 3) if len(shown) > 1 else drawing.figure(width, 4)
    if len(measured) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(measured)} runs")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        for color, (run, lines) in zip(_colors(len(shown)), shown.items()):
            for split, style in _SPLITS.items():
                points = [(line["epoch"], line[f"{split}_{metric}"]) for line in lines if f"{split}_{metric}" in line]
                if points:
                    label = f"{drawing.literal(run)} {split}" if len(shown) > 1 else split
                    axes.plot(*zip(*_thin(points, _MAX_LINE_POINTS)), style, marker=".", color=color, label=label)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    # Not loc="best": with many points, matplotlib takes seconds to find that place.
    if len(shown) > 1:
        figure.axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    else:
        figure.axes[0].legend(fontsize="small", loc="upper right")
    return figure


def scaling(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Plots speed and efficiency by number of devices, from the rows of scaling.json; dotted: linear scaling."""
    figure = drawing.figure(10, 4)
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
        axes.set_xticks(_thin(devices, 20))
        axes.grid(alpha=0.3)
    return figure


def plan(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Plots estimated step time and efficiency by number of chips, from the rows of plan.json that fit in memory."""
    figure = drawing.figure(10, 4)
    left, right = figure.subplots(1, 2)
    fitting = [row for row in rows if row["fits"]]
    for name in dict.fromkeys(row.get("strategy", "plan") for row in fitting):
        matching = [row for row in fitting if row.get("strategy", "plan") == name]
        style = "o-" if "strategy" in matching[0] else "o"
        left.plot(*zip(*((row["num_chips"], row["step_seconds"] * 1e3) for row in matching)), style, label=name)
        efficiencies = [(row["num_chips"], row["scaling_efficiency"]) for row in matching]
        if known := [(chips, efficiency) for chips, efficiency in efficiencies if efficiency is not None]:
            right.plot(*zip(*known), style, label=name)
    milliseconds = [row["step_seconds"] * 1e3 for row in fitting]
    if max(milliseconds, default=1) > 10 * min(milliseconds, default=1):
        left.set_yscale("log")
    else:
        left.set_ylim(0, 1.1 * max(milliseconds, default=1))
    left.set(xlabel="chips", ylabel="milliseconds a step, estimated")
    right.set(xlabel="chips", ylabel="efficiency, estimated", ylim=(0, 1.1))
    right.axhline(1.0, color="k", linestyle=":")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def confusion(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> Any:
    """Plots the confusion matrix or, if there are more than 30 classes, the most frequently confused pairs.

    Args:
      labels, predictions: int [n].
      names: the class names.
    """
    draw = _confusion_matrix if len(names) <= _MAX_CLASSES else _confused_pairs
    return draw(labels, predictions, names)


def _confusion_matrix(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> Any:
    """Plots labels by row and predictions by column, colored by the fraction of the row."""
    counts = np.zeros((len(names), len(names)), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    shown = [drawing.literal(name, 24) for name in names]
    side = max(4.0, 0.55 * len(names) + 1.5) + 0.08 * max(map(len, shown))
    figure = drawing.figure(side, side)
    axes = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), shown, rotation=90)
    axes.set_yticks(range(len(names)), shown)
    axes.set(xlabel="predicted", ylabel="label", title=f"accuracy {np.trace(counts) / len(labels):.4f}")
    if len(names) <= 20:  # illegible for more
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize="x-small", color=color)
    return figure


def _confused_pairs(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> Any:
    """Plots the 30 most frequent mistakes as bars, with counts and shares of the label's examples."""
    wrong = labels != predictions
    # Only the pairs that occur: the matrix of 20,000 classes would take 3 GB.
    pairs, counts = np.unique(labels[wrong].astype(np.int64) * len(names) + predictions[wrong], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_MAX_CLASSES]
    pairs, counts = pairs[most], counts[most]
    totals = np.bincount(labels, minlength=len(names))
    figure = drawing.figure(9, 0.27 * len(pairs) + 1.5)
    axes = figure.subplots()
    bars = axes.barh(range(len(pairs)), counts)
    axes.bar_label(bars, [f"{n:,} ({n / totals[pair // len(names)]:.0%})" for pair, n in zip(pairs, counts)], padding=3)
    both = (divmod(int(pair), len(names)) for pair in pairs)
    shown = [f"{drawing.literal(names[i], 24)} -> {drawing.literal(names[k], 24)}" for i, k in both]
    axes.set_yticks(range(len(pairs)), shown, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(
        xlabel="examples (share of the label's)",
        title=f"accuracy {1 - wrong.mean():.4f}: the most frequent mistakes, label -> prediction",
    )
    return figure


def reliability(confidences: np.ndarray, correct: np.ndarray, num_bins: int) -> Any:
    """Plots accuracy, mean and number of `confidences` [n] in bins of equal width; `correct` is bool [n]."""
    bins = np.clip(np.ceil(confidences * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    accuracy, confidence = (
        np.bincount(bins, values, minlength=num_bins) / np.maximum(counts, 1) for values in (correct, confidences)
    )
    error = float((np.abs(accuracy - confidence) * counts).sum() / len(bins))
    figure = drawing.figure(5, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, width = np.arange(num_bins) / num_bins, 1 / num_bins
    upper.bar(left, accuracy, width, align="edge", edgecolor="white", label="accuracy")
    upper.plot(confidence[counts > 0], accuracy[counts > 0], "k.", clip_on=False, label="mean confidence")
    upper.plot([0, 1], [0, 1], "k:", label="calibrated")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"expected calibration error {error:.4f}")
    upper.legend(fontsize="small", loc="upper left")
    lower.bar(left, counts, width, align="edge", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="examples")
    return figure


def most_confident_mistakes(labels: np.ndarray, predictions: np.ndarray, confidences: np.ndarray) -> np.ndarray:
    """Returns the positions of the up to 25 most confidently misclassified examples, most confident first."""
    wrong = np.flatnonzero(predictions != labels)
    return wrong[np.argsort(-confidences[wrong], kind="stable")][:25]


def mistakes(
    images: np.ndarray,
    shown: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    confidences: np.ndarray,
    names: Sequence[str],
) -> Any:
    """Plots misclassified examples.

    Args:
      images: uint8 [m, h, w, c], c 1 or 3.
      shown: int [m], their positions among all n (`most_confident_mistakes`).
      labels, predictions: int [n], of all examples.
      confidences: float [n], the probabilities of the predictions.
      names: the class names.
    """
    rows = max(-(-len(shown) // 5), 1)
    figure = drawing.figure(9, 2 * rows + 0.5)
    axes = figure.subplots()  # one for all images: laying out 25 takes a second
    axes.set_title(f"{(predictions != labels).sum():,} mistakes of {len(labels):,}: label, prediction (probability)")
    step = -(-5 * max(images.shape[1:3]) // _MAX_PIXELS)
    for number, i in enumerate(shown.tolist()):
        row, column = divmod(number, 5)
        left, bottom = 1.2 * column, 1.2 * (rows - row)
        image = images[number][::step, ::step]
        image = image.squeeze(-1) if image.shape[-1] == 1 else image
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(left, left + 1, bottom, bottom + 1))
        label, prediction = (drawing.literal(names[k], 24) for k in (int(labels[i]), int(predictions[i])))
        separator = ", " if len(label) + len(prediction) < 24 else ",\n"
        text = f"{label}{separator}{prediction} ({confidences[i]:.2f})"
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
    rows = -(-len(images) // columns)
    step = -(-max(rows * images.shape[1], columns * images.shape[2]) // _MAX_PIXELS)
    images = images[:, ::step, ::step]
    count, height, width, channels = images.shape
    cells = np.ones((rows * columns, height + 1, width + 1, channels), np.float32)
    cells[:count, :height, :width] = images
    cells = cells.reshape(rows, columns, height + 1, width + 1, channels).swapaxes(1, 2)
    tiled = cells.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    figure = drawing.figure(7, 7 * tiled.shape[0] / tiled.shape[1] + 0.5)
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
    kept = _thin(np.arange(len(points)), _MAX_DOTS)
    points, labels = points[kept], labels[kept]
    figure = drawing.figure(7, 6)
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    if len(names) > _MAX_CLASSES:
        dots = axes.scatter(*points.T, s=3, c=labels, cmap="turbo", vmin=0, vmax=len(names) - 1)
        figure.colorbar(dots, label="label number")
        return figure
    for label, (name, color) in enumerate(zip(names, _colors(len(names)))):
        axes.scatter(*points[labels == label].T, s=3, color=color, label=drawing.literal(name, 24))
    axes.legend(markerscale=4, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scaling_law(found: Mapping[str, Any]) -> Any:
    """Plots measurements by size, their fitted power law and its extrapolation (`found`: see `launch.sweeps.fit`)."""
    figure = drawing.figure(6, 4)
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
    top = 2 * max(*values, *(row["expected"] for row in beyond))  # intervals far beyond the data may be enormous
    axes.set(xlabel=found["by"], ylabel=found["figure"], xscale="log", ylim=(None, min(top, axes.get_ylim()[1])))
    axes.grid(alpha=0.3)
    return figure
