"""Study: do recurrent language models scale like a Transformer? Loss by parameters, FLOPs and seconds.

python -m benchmarks.language --study [--seeds=5] [--epochs=2] [--widths=32,64,128,256]

All networks have two layers and see the same tokens. Each one's learning rate is the best of a sweep at the smallest
width, on the validation split; muP transfers it to the others (research/parametrization.py). Losses are those of the
test split, in nats per token; FLOPs are those of the compiled step. A power law (`launch/sweeps/scaling_law.py`) is
fitted to each network's losses, and tested by predicting the largest width from the others: the interval is for a run
with another seed. A study that was interrupted continues with the same flags. Without --study, the results of an
earlier study are fitted and plotted again.
"""

import collections
import dataclasses
import json
from typing import Any

import joblib
import numpy as np
from absl import flags

from benchmarks import command, output, several_seeds, trials
from experiments import char_rnn
from launch.sweeps import scaling_law
from launch.sweeps.scaling_law import ScalingLaw
from research import flags as experiment_flags
from research.config import DatasetConfig
from research.errors import UserError
from research.record import drawing

NETWORKS = ("lstm", "gru", "mingru", "lru", "transformer")
SIZES = {"parameters": "parameters", "flops": "FLOPs of training", "seconds": "seconds of training"}
_EXPERIMENT = "experiments.char_rnn"
_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a study; losses of other settings are not comparable."""

    dataset: str = "tiny_shakespeare"
    epochs: int = 2
    widths: tuple[int, ...] = (32, 64, 128, 256)
    rates: tuple[float, ...] = (0.004, 0.008, 0.016, 0.032, 0.064)
    seeds: int = 5


def define_flags() -> None:
    """Defines the flags; not on import, since other benchmarks have flags of the same names."""
    default = Settings()
    flags.DEFINE_bool("study", False, "train the networks; otherwise fit and plot the results of an earlier study")
    flags.DEFINE_string("dataset", default.dataset, "the text")
    flags.DEFINE_integer("epochs", default.epochs, "passes over the training text", lower_bound=1)
    flags.DEFINE_list("widths", list(map(str, default.widths)), "widths of each network")
    flags.DEFINE_list("rates", list(map(str, default.rates)), "learning rates to try at the smallest width")


def given_settings() -> Settings:
    """Returns the settings that the flags give.

    Raises:
      UserError: a width or rate is not a positive number, or there are too few widths.
    """
    given = flags.FLAGS
    widths = command.numbers("widths", given.widths, int, scaling_law.FEWEST, "for the power law")
    rates = command.numbers("rates", given.rates)
    return Settings(given.dataset, given.epochs, widths, rates, given.seeds)


def flags_of(settings: Settings, network: str, width: int, rate: float) -> list[str]:
    """Returns the command line of one network, without seed and workdir."""
    model = {"name": network, "width": width, "layers": _LAYERS, "dropout": 0.0}
    model |= {"parametrization": "mup", "base_width": settings.widths[0]}
    fields = {f"model.{name}": value for name, value in model.items()}
    fields |= {"num_epochs": settings.epochs, "dataset.name": settings.dataset, "optimizer.learning_rate": rate}
    return [f"--config.{name}={value}" for name, value in fields.items()]


def best_rate(settings: Settings, network: str) -> float:
    """Returns the learning rate with the lowest validation loss at the smallest width; all train in one program.

    Raises:
      UserError: every run diverged.
    """
    rates = settings.rates
    args = flags_of(settings, network, settings.widths[0], rates[0])
    config = experiment_flags.parse(char_rnn.EXPERIMENT, args).config
    runs = trials.train(char_rnn.EXPERIMENT, config, [{"optimizer.learning_rate": rate} for rate in rates])
    losses = [(run["loss"], rate) for run, rate in zip(runs, rates) if run]
    if not losses:
        raise UserError(f"--rates={','.join(map(str, rates))}: {network} diverged with all of them: add smaller ones")
    best = min(losses)[1]
    if best in (min(rates), max(rates)):
        print(f"{network}: the best learning rate, {best:g}, is at the edge of --rates")
    return best


def row(settings: Settings, network: str, width: int, rate: float) -> dict[str, Any]:
    """Measures one network."""
    args = flags_of(settings, network, width, rate)
    measured = several_seeds.measure(_EXPERIMENT, args, "test_loss", settings.seeds)
    return {"network": network, "width": width, "learning_rate": rate, **measured}


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    return (
        f"| {row['network']} | {row['width']} | {row['learning_rate']:g} | {row['parameters']:,} | "
        f"{row['flops'] / 1e12:.2f} | {row['seconds']:.0f} | {several_seeds.shown(row)} |"
    )


def _points(rows: list[dict[str, Any]], network: str, size: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a network's widths, sizes and test losses, [n] each, one for every run."""
    runs = [(row["width"], row[size], loss) for row in rows if row["network"] == network for loss in row["test_loss"]]
    widths, sizes, losses = np.array(runs).T
    return widths, sizes, losses


def law(rows: list[dict[str, Any]], network: str, size: str) -> tuple[ScalingLaw, dict[str, Any]]:
    """Fits the losses of a network by a size, and predicts those of the largest width from the others."""
    widths, sizes, losses = _points(rows, network, size)
    smaller = widths < widths.max()
    fitted, fitted_without_largest = scaling_law.fit(sizes, losses), scaling_law.fit(sizes[smaller], losses[smaller])
    largest = sizes[~smaller].mean()
    low, high = fitted_without_largest.interval(largest)
    deviations = np.sqrt(np.diag(fitted.covariance))
    return fitted, {
        "network": network,
        "size": size,
        "floor": [fitted.floor, float(deviations[0])],
        "exponent": [fitted.exponent, float(deviations[2])],
        "largest_expected": float(fitted_without_largest(largest)),
        "largest_interval": [float(low), float(high)],
        "largest_measured": float(losses[~smaller].mean()),
    }


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots test loss by parameters, FLOPs and seconds, with the fitted power law of each network."""
    figure = drawing.figure(12, 3.8)
    networks = _complete(rows)
    for axes, (size, label) in zip(figure.subplots(1, len(SIZES), sharey=True), SIZES.items()):
        for network in networks:
            _, sizes, losses = _points(rows, network, size)
            (points,) = axes.plot(sizes, losses, ".", label=network)
            curve = np.geomspace(sizes.min(), sizes.max() * 2, 50)
            axes.plot(curve, law(rows, network, size)[0](curve), "-", linewidth=1, color=points.get_color())
        axes.set(xlabel=label, xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test loss, nats per token")
    figure.axes[0].legend(fontsize="small")
    return figure


def study(settings: Settings) -> list[dict[str, Any]]:
    """Trains all networks and returns their rows; the results are written after each one."""
    trials.check_data([DatasetConfig(name=settings.dataset)])
    out, record = output.folder(), {"settings": json.loads(json.dumps(dataclasses.asdict(settings)))}
    path = out / "language.json"
    earlier = json.loads(path.read_bytes()) if path.is_file() else {}
    rows = earlier["rows"] if earlier.get("settings") == record["settings"] else []
    print("| network | width | learning rate | parameters | TFLOP, training | seconds | test loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for network in NETWORKS:
        done = {row["width"]: row["learning_rate"] for row in rows if row["network"] == network}
        rate = next(iter(done.values()), None) or best_rate(settings, network)
        for width in settings.widths:
            if width not in done:
                rows.append(row(settings, network, width, rate))
                print(line(rows[-1]), flush=True)
                output.write(out, "language", {"cores": joblib.cpu_count(), **record, "rows": rows})
    return rows


def _complete(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the networks that have enough widths for a power law."""
    counts = collections.Counter(row["network"] for row in rows)
    return [network for network, count in counts.items() if count >= scaling_law.FEWEST]


def main() -> None:
    out = output.folder()
    path = out / "language.json"
    is_study = flags.FLAGS.study
    if not is_study:
        for name in ("dataset", "epochs", "widths", "rates", "seeds"):
            if flags.FLAGS[name].present:
                raise UserError(f"--{name} is for --study: add it, or leave --{name} out")
        if not path.is_file():
            raise UserError(f"{path} does not exist: train the networks with --study")
    rows = study(given_settings()) if is_study else json.loads(path.read_bytes())["rows"]
    laws = [law(rows, network, size)[1] for network in _complete(rows) for size in SIZES]
    for found in laws:
        print(json.dumps(found))
    output.write(out, "language", json.loads(path.read_bytes()) | {"laws": laws})
    drawing.save(out / "language.png", lambda: plot(rows))


if __name__ == "__main__":
    define_flags()
    command.start(main)
