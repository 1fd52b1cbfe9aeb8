"""Study: do recurrent language models scale like a Transformer? Loss by parameters, FLOPs and seconds.

python -m benchmarks.language --study [--seeds=2] [--epochs=2] [--widths=32,64,128,256]

All networks have two layers and see the same tokens. Each one's learning rate is the best of a sweep at the smallest
width, on the validation split; muP transfers it to the others (research/parametrization.py). Losses are those of the
test split, in nats per token; FLOPs are those of the compiled step. A power law (`launch/sweeps/scaling_law.py`) is
fitted to each network's losses, and tested by predicting the largest width from the others. Without --study, the
results of an earlier study are fitted and plotted again.
"""

import json
import os
import statistics
from typing import Any

import numpy as np
from absl import flags

from benchmarks import command, output, several_seeds, trials
from experiments import char_rnn
from launch.sweeps import scaling_law
from launch.sweeps.scaling_law import ScalingLaw
from research.config import DatasetConfig
from research.errors import UserError
from research.record import drawing

NETWORKS = ("lstm", "gru", "mingru", "lru", "transformer")
SIZES = {"parameters": "parameters", "flops": "FLOPs of training", "seconds": "seconds of training"}
_EXPERIMENT = "experiments.char_rnn"
_LAYERS = 2

_STUDY = flags.DEFINE_bool("study", False, "train the networks; otherwise fit and plot the results of an earlier study")
_DATASET = flags.DEFINE_string("dataset", "tiny_shakespeare", "the text")
_EPOCHS = flags.DEFINE_integer("epochs", 2, "passes over the training text", lower_bound=1)
_WIDTHS = flags.DEFINE_list("widths", ["32", "64", "128", "256"], "widths of each network, smallest first")
_RATES = flags.DEFINE_list(
    "rates", ["0.001", "0.002", "0.004", "0.008", "0.016"], "learning rates to try at the smallest width"
)


def flags_of(network: str, width: int, base_width: int, rate: float) -> list[str]:
    """Returns the command line of one network, without seed and workdir."""
    model = {"name": network, "width": width, "layers": _LAYERS, "dropout": 0.0}
    model |= {"parametrization": "mup", "base_width": base_width}
    fields = {f"model.{name}": value for name, value in model.items()}
    fields |= {"num_epochs": _EPOCHS.value, "dataset.name": _DATASET.value, "optimizer.learning_rate": rate}
    return [f"--config.{name}={value}" for name, value in fields.items()]


def best_rate(network: str, width: int, rates: list[float]) -> float:
    """Returns the learning rate with the lowest validation loss; all of them train together in one program.

    Raises:
      UserError: every run diverged.
    """
    config = char_rnn.get_config()
    config.dataset = DatasetConfig(name=_DATASET.value)
    config.num_epochs = _EPOCHS.value
    model = config.model
    model.name, model.width, model.layers, model.dropout = network, width, _LAYERS, 0.0
    model.parametrization, model.base_width = "mup", width
    runs = trials.train(char_rnn.EXPERIMENT, config, [{"optimizer.learning_rate": rate} for rate in rates])
    losses = [(run["loss"], rate) for run, rate in zip(runs, rates) if run]
    if not losses:
        raise UserError(f"--rates={','.join(map(str, rates))}: {network} diverged with all of them: add smaller ones")
    return min(losses)[1]


def row(network: str, width: int, args: list[str], rate: float) -> dict[str, Any]:
    """Measures one network."""
    seeds = range(1, several_seeds.SEEDS.value + 1)
    runs = [trials.summary(_EXPERIMENT, [*args, f"--config.seed={seed}"]) for seed in seeds]
    losses = [run["test_loss"] for run in runs]
    return {
        "network": network,
        "width": width,
        "learning_rate": rate,
        "parameters": runs[0]["num_params"],
        "flops": trials.flops(_EXPERIMENT, args) * runs[0]["num_train_steps"],
        "seconds": statistics.median(run["train_seconds"] for run in runs),
        "test_loss": losses,
        **several_seeds.spread(losses),
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    return (
        f"| {row['network']} | {row['width']} | {row['learning_rate']:g} | {row['parameters']:,} | "
        f"{row['flops'] / 1e12:.2f} | {row['seconds']:.0f} | {several_seeds.shown(row)} |"
    )


def _points(rows: list[dict[str, Any]], network: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a network's sizes and test losses, [n] each, one for every run."""
    pairs = [(row[size], loss) for row in rows if row["network"] == network for loss in row["test_loss"]]
    sizes, losses = np.array(pairs).T
    return sizes, losses


def law(rows: list[dict[str, Any]], network: str, size: str) -> tuple[ScalingLaw, dict[str, Any]]:
    """Fits the losses of a network by a size, and predicts those of the largest width from the others."""
    sizes, losses = _points(rows, network, size)
    whole, smaller = scaling_law.fit(sizes, losses), sizes < sizes.max()
    without = scaling_law.fit(sizes[smaller], losses[smaller])
    low, high = without.interval(sizes.max())
    deviations = np.sqrt(np.diag(whole.covariance))
    return whole, {
        "network": network,
        "size": size,
        "floor": [whole.floor, float(deviations[0])],
        "exponent": [whole.exponent, float(deviations[2])],
        "largest_expected": float(without(sizes.max())),
        "largest_interval": [float(low), float(high)],
        "largest_measured": float(losses[~smaller].mean()),
    }


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots test loss by parameters, FLOPs and seconds, with the fitted power law of each network."""
    figure = drawing.figure(12, 3.8)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for axes, (size, label) in zip(figure.subplots(1, len(SIZES), sharey=True), SIZES.items()):
        for network in networks:
            sizes, losses = _points(rows, network, size)
            (points,) = axes.plot(sizes, losses, ".", label=network)
            curve = np.geomspace(sizes.min(), sizes.max() * 2, 50)
            axes.plot(curve, law(rows, network, size)[0](curve), "-", linewidth=1, color=points.get_color())
        axes.set(xlabel=label, xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test loss, nats per token")
    figure.axes[0].legend(fontsize="small")
    return figure


def study() -> list[dict[str, Any]]:
    """Trains all networks and returns their rows; the results are written after each one."""
    out, rows = output.folder(), []
    trials.check_data([DatasetConfig(name=_DATASET.value)])
    widths, rates = _numbers("widths", _WIDTHS.value, int), _numbers("rates", _RATES.value, float)
    print("| network | width | learning rate | parameters | TFLOP, training | seconds | test loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for network in NETWORKS:
        rate = best_rate(network, widths[0], rates)
        for width in widths:
            rows.append(row(network, width, flags_of(network, width, widths[0], rate), rate))
            print(line(rows[-1]), flush=True)
            output.write(out, "language", {"cores": os.cpu_count(), "dataset": _DATASET.value, "rows": rows})
    return rows


def _numbers(name: str, values: list[str], kind: type) -> list[Any]:
    try:
        numbers = [kind(value) for value in values]
    except ValueError:
        numbers = []
    if min(numbers, default=0) <= 0 or (name == "widths" and len(set(numbers)) < scaling_law.FEWEST):
        need = f", at least {scaling_law.FEWEST} for the power law" if name == "widths" else ""
        raise UserError(f"--{name}={','.join(values)}: give positive numbers, separated by commas{need}")
    return sorted(numbers)


def main() -> None:
    out = output.folder()
    path = out / "language.json"
    if not (_STUDY.value or path.is_file()):
        raise UserError(f"{path} does not exist: train the networks with --study")
    rows = study() if _STUDY.value else json.loads(path.read_bytes())["rows"]
    laws = [law(rows, network, size)[1] for network in dict.fromkeys(r["network"] for r in rows) for size in SIZES]
    for found in laws:
        print(json.dumps(found))
    output.write(out, "language", json.loads(path.read_bytes()) | {"laws": laws})
    drawing.save(out / "language.png", lambda: plot(rows))


if __name__ == "__main__":
    command.start(main)
