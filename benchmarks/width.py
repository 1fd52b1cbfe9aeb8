"""Loss by learning rate for networks of different widths: standard parametrization against muP.

python -m benchmarks.width [--network=cnn,lstm,vae]

Adam with a constant learning rate. All rates of one width train together in one program (`population.py`); the loss is
that of the validation split after the last epoch. With muP, rates are those at the narrowest width. Rows of other
networks are kept in the results.
"""

import copy
import dataclasses
import math
from typing import Any

from absl import flags

from benchmarks import command, output, trials
from experiments import char_rnn, cifar_cnn, mnist_vae
from research.config import CNNConfig, Config, OptimizerConfig, RNNConfig, VAEConfig
from research.experiment import Experiment
from research.record import drawing


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its config, and the widths and learning rates to try."""

    experiment: Experiment
    config: Config
    widths: tuple[int, ...]
    rates: tuple[float, ...]


def cases() -> dict[str, Case]:
    """Returns the cases by name; cnn and vae take a minute or two each on two cores, lstm longer."""
    adam = OptimizerConfig(name="adam")
    cnn = cifar_cnn.CifarConfig(num_epochs=3, batch_size=32, dataset=trials.DIGITS, optimizer=adam, model=CNNConfig())
    lstm = char_rnn.CharRNNConfig(
        num_epochs=2, batch_size=32, sequence_length=64, dataset=trials.TEXT, optimizer=adam, model=RNNConfig(layers=1)
    )
    vae = mnist_vae.MnistVAEConfig(
        num_epochs=10, batch_size=32, dataset=trials.DIGITS, optimizer=adam, model=VAEConfig()
    )
    return {
        "cnn": Case(cifar_cnn.EXPERIMENT, cnn, (8, 16, 32, 64), _rates(-12, -4)),
        "lstm": Case(char_rnn.EXPERIMENT, lstm, (32, 64, 128, 256), _rates(-10, -2)),
        "vae": Case(mnist_vae.EXPERIMENT, vae, (64, 128, 256, 512), _rates(-13, -5)),
    }


def _rates(low: int, high: int) -> tuple[float, ...]:
    return tuple(2.0**exponent for exponent in range(low, high + 1))


NETWORK = flags.DEFINE_list("network", list(cases()), f"networks to train: {', '.join(cases())}")
flags.register_validator("network", lambda names: set(names) <= set(cases()), f"use {', '.join(cases())}")


def losses(case: Case, parametrization: str, width: int) -> list[float | None]:
    """Returns the validation loss for each rate; None if the run diverged."""
    config: Any = copy.deepcopy(case.config)
    config.model.width, config.model.parametrization = width, parametrization
    config.model.base_width = case.widths[0] if parametrization == "mup" else 0
    runs = trials.train(case.experiment, config, [{"optimizer.learning_rate": rate} for rate in case.rates])
    return [run.get("loss") for run in runs]


def line(row: dict[str, Any]) -> str:
    """Formats the best rate of a row and its loss."""
    loss, rate = min((loss, rate) for loss, rate in zip(row["losses"], row["rates"]) if loss is not None)
    return (
        f"{row['network']:<5} {row['parametrization']:<9} width {row['width']:>4}: best rate 2^{math.log2(rate):.0f}, "
        f"loss {loss:.4f}"
    )


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots loss by learning rate, a line per width: a row per network, a column per parametrization."""
    networks, columns = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "parametrization"))
    figure = drawing.figure(4.5 * len(columns), 3 * len(networks))
    grid = figure.subplots(len(networks), len(columns), squeeze=False, sharey="row")
    for row in rows:
        axes = grid[networks.index(row["network"])][columns.index(row["parametrization"])]
        points = [(rate, loss) for rate, loss in zip(row["rates"], row["losses"]) if loss is not None]
        axes.plot(*zip(*points), ".-", label=str(row["width"]))
        axes.set(title=f"{row['network']}, {row['parametrization']}", xscale="log", xlabel="learning rate")
    for network, panels in zip(networks, grid):
        best = [min(x for x in row["losses"] if x is not None) for row in rows if row["network"] == network]
        panels[0].set(ylabel="validation loss", ylim=(min(best) * 0.9, max(best) * 2.5))
        for axes in panels:
            axes.grid(alpha=0.3)
            axes.legend(title="width", fontsize="small")
    return figure


def main() -> None:
    out = output.folder()
    rows: list[dict[str, Any]] = []
    for name in NETWORK.value:
        case = cases()[name]
        for parametrization in ("standard", "mup"):
            for width in case.widths:
                found = losses(case, parametrization, width)
                row = {"network": name, "parametrization": parametrization, "width": width}
                row |= {"rates": case.rates, "losses": found}
                print(line(row), flush=True)
                rows = output.merge(out, "width", [row], ("network", "parametrization", "width"))
    drawing.save(out / "width.png", lambda: plot(rows))


if __name__ == "__main__":
    command.start(main)
