"""Compares optimizers: each with its learning rate tuned by equally many trials, then several seeds on the test set.

python -m benchmarks.algorithms [--study=cnn,lstm,vae,cifar] [--seeds=5]

The trials of a rule are its default learning rate times powers of the square root of 10, with cosine decay to 0. The
rate that is best on the validation split is trained again from other seeds. All rates of a rule train in one program,
and so do all seeds (`population.py`). The study `cifar` (CIFAR-10, needs TFDS_DATA_DIR) has three batch sizes. Rows of
other studies are kept in the results.
"""

import copy
import dataclasses
from typing import Any

from absl import flags

from benchmarks import command, output, several_seeds, trials
from experiments import char_rnn, cifar_cnn, mnist_vae
from research import optimizers
from research.config import CNNConfig, Config, DatasetConfig, OptimizerConfig, RNNConfig, VAEConfig
from research.experiment import Experiment
from research.record import drawing

_RULES = ("sgd", "momentum", "nesterov", "adagrad", "adam", "muon")


@dataclasses.dataclass(frozen=True)
class Study:
    """A network and its data, at several batch sizes.

    Attributes:
      what: the name in tables and plots.
      experiment: the experiment.
      config: its config; the optimizer and the batch size are replaced.
      batch_sizes: the learning rate is tuned for each.
      reach: number of rates tried on either side of the default.
    """

    what: str
    experiment: Experiment
    config: Config
    batch_sizes: tuple[int, ...]
    reach: int


def studies() -> dict[str, Study]:
    """Returns the studies by name; the first three take a few minutes each on two cores, the last about 40."""
    cnn = cifar_cnn.CifarConfig(num_epochs=10, dataset=trials.DIGITS, model=CNNConfig(width=16))
    lstm = char_rnn.CharRNNConfig(
        num_epochs=4, sequence_length=64, dataset=trials.TEXT, model=RNNConfig(name="lstm", layers=1, width=128)
    )
    vae = mnist_vae.MnistVAEConfig(num_epochs=30, dataset=trials.DIGITS, model=VAEConfig(width=200))
    part = DatasetConfig(name="cifar10", validation_fraction=0.1, train_fraction=0.2)
    cifar = cifar_cnn.CifarConfig(num_epochs=4, dataset=part)
    return {
        "cnn": Study("CNN, digits", cifar_cnn.EXPERIMENT, cnn, (32,), 3),
        "lstm": Study("LSTM, pydoc", char_rnn.EXPERIMENT, lstm, (32,), 3),
        "vae": Study("VAE, digits", mnist_vae.EXPERIMENT, vae, (32,), 3),
        "cifar": Study("CNN, CIFAR-10", cifar_cnn.EXPERIMENT, cifar, (32, 256, 2048), 2),
    }


STUDY = flags.DEFINE_list("study", list(studies()), f"which studies: {', '.join(studies())}")
flags.register_validator("study", lambda names: set(names) <= set(studies()), f"use {', '.join(studies())}")


def measure(study: Study, rule: str, batch_size: int, seeds: int) -> dict[str, Any]:
    """Returns a row: the rates, their validation metrics, and the test metrics of the best rate."""
    config: Any = copy.deepcopy(study.config)
    config.batch_size, config.optimizer = batch_size, OptimizerConfig(name=rule, schedule="cosine")
    default = optimizers.DEFAULTS[rule].learning_rate
    rates = [default * 10 ** (k / 2) for k in range(-study.reach, study.reach + 1)]
    tuning = trials.train(study.experiment, config, [{"optimizer.learning_rate": rate} for rate in rates])
    best = trials.best(tuning)
    repeats = [{"optimizer.learning_rate": rates[best], "seed": seed} for seed in range(1, seeds + 1)]
    metric = "accuracy" if "accuracy" in tuning[best] else "loss"
    values = [run.get(metric) for run in trials.train(study.experiment, config, repeats, test=True)]
    return {
        "what": study.what,
        "rule": rule,
        "batch_size": batch_size,
        "figure": metric,
        "rates": rates,
        "validation": [run.get(metric) for run in tuning],
        "learning_rate": rates[best],
        "test": values,
        **several_seeds.spread(values),
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    return (
        f"| {row['what']} | {row['batch_size']} | {row['rule']} | {row['learning_rate']:.2g} | "
        f"{row['figure']} {several_seeds.shown(row)} |"
    )


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots each rule's test metric, mean and standard deviation: a panel per study, a color per batch size."""
    panels = list(dict.fromkeys(row["what"] for row in rows))
    figure = drawing.figure(3.6 * len(panels), 3.6)
    for what, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        shown = [row for row in rows if row["what"] == what and row["standard_deviation"] is not None]
        for batch_size in dict.fromkeys(row["batch_size"] for row in shown):
            points = [row for row in shown if row["batch_size"] == batch_size]
            columns = ([row[key] for row in points] for key in ("rule", "mean", "standard_deviation"))
            axes.errorbar(*columns, fmt="o", capsize=4, label=f"batch {batch_size:,}")
        axes.set(title=what, ylabel=" or ".join(dict.fromkeys(f"test {row['figure']}" for row in shown)))
        axes.tick_params("x", rotation=60)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def main() -> None:
    out, chosen = output.folder(), [studies()[name] for name in STUDY.value]
    trials.check_data(study.config.dataset for study in chosen)
    rows: list[dict[str, Any]] = []
    print("| network, data | batch | rule | learning rate | test, mean ± standard deviation |")
    print("| --- | --- | --- | --- | --- |")
    for study in chosen:
        for batch_size in study.batch_sizes:
            for rule in _RULES:
                row = measure(study, rule, batch_size, several_seeds.SEEDS.value)
                print(line(row), flush=True)
                rows = output.merge(out, "algorithms", [row], ("what", "rule", "batch_size"))
    drawing.save(out / "algorithms.png", lambda: plot(rows))


if __name__ == "__main__":
    command.start(main)
