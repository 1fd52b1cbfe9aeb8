"""Compares architectures: accuracy by parameters, FLOPs and seconds of the convolutional networks.

python -m benchmarks.structures [--seeds=5] [--dataset=cifar10]

Every network is trained by the default recipe of `experiments.cifar_cnn`, for four epochs of a fifth of the training
set, in one process per seed. FLOPs are those of the compiled step. A power law (`sweeps/scaling_law.py`) is fitted to
the errors of the simple network by width, and tested by predicting the widest from the others.
"""

import json
from typing import Any

import joblib
import numpy as np
from absl import flags

from benchmarks import command, output, several_seeds, trials
from launch.sweeps import scaling_law
from research.config import DatasetConfig
from research.record import drawing

NETWORKS = {
    "simple": [{"width": width} for width in (8, 16, 32, 64)],
    "airbench": [{"width": width} for width in (8, 16, 32)],
    "resnet": [{"width": width} for width in (4, 8, 16)],
    "wide_resnet": [{"width": width, "depth": 10} for width in (1, 2)],
}
_EXPERIMENT = "experiments.cifar_cnn"
DATASET = flags.DEFINE_string("dataset", "cifar10", "data set of images")


def flags_of(name: str, fields: dict[str, int], dataset: str) -> list[str]:
    """Returns the command line of one network, without seed and workdir."""
    model = [f"--config.model.{field}={value}" for field, value in {"name": name, **fields}.items()]
    data = [f"--config.dataset.name={dataset}", "--config.dataset.train_fraction=0.2", "--config.num_epochs=4"]
    return [*model, *data]


def row(name: str, fields: dict[str, int], dataset: str, seeds: int) -> dict[str, Any]:
    """Measures one network."""
    measured = several_seeds.measure(_EXPERIMENT, flags_of(name, fields, dataset), "test_accuracy", seeds)
    return {"network": name, **fields, **measured}


def law(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fits the simple network's error by parameters, and predicts the widest network's from the others."""
    points = [(r["parameters"], 1 - value) for r in rows if r["network"] == "simple" for value in r["test_accuracy"]]
    sizes, errors = np.array(points).T
    whole, smaller = scaling_law.fit(sizes, errors), sizes < sizes.max()
    without = scaling_law.fit(sizes[smaller], errors[smaller])
    low, high = without.interval(sizes.max())
    return {
        "floor": whole.floor,
        "exponent": whole.exponent,
        "widest_expected": float(without(sizes.max())),
        "widest_interval": [float(low), float(high)],
        "widest_measured": float(errors[~smaller].mean()),
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    return (
        f"| {row['network']} | {row['width']} | {row['parameters']:,} | {row['flops'] / 1e12:.2f} | "
        f"{row['seconds']:.1f} | {several_seeds.shown(row)} |"
    )


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots test accuracy by parameters, FLOPs and seconds, with a line per network."""
    figure = drawing.figure(12, 3.8)
    # Only after `drawing.figure`, which makes sure that matplotlib can be imported.
    from matplotlib.ticker import LogLocator, NullFormatter

    sizes = {"parameters": "parameters", "flops": "FLOPs of the training", "seconds": "seconds of training"}
    for axes, (size, label) in zip(figure.subplots(1, len(sizes), sharey=True), sizes.items()):
        for network in dict.fromkeys(row["network"] for row in rows):
            points = [row for row in rows if row["network"] == network]
            columns = ([row[key] for row in points] for key in (size, "mean", "standard_deviation"))
            axes.errorbar(*columns, fmt="o-", capsize=3, label=network)
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy")
    figure.axes[0].legend(fontsize="small")
    return figure


def main() -> None:
    out, rows = output.folder(), []
    trials.check_data([DatasetConfig(name=DATASET.value)])
    record = {"cores": joblib.cpu_count(), "dataset": DATASET.value, "rows": rows}
    print("| network | width | parameters | TFLOP, training | seconds | test accuracy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, sizes in NETWORKS.items():
        for fields in sizes:
            rows.append(row(name, fields, DATASET.value, several_seeds.SEEDS.value))
            print(line(rows[-1]), flush=True)
            output.write(out, "structures", record)
    record["law"] = law(rows)
    print(json.dumps(record["law"]))
    output.write(out, "structures", record)
    drawing.save(out / "structures.png", lambda: plot(rows))


if __name__ == "__main__":
    command.start(main)
