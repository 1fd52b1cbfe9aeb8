"""Which training algorithm: each rule with its learning rate tuned by equal trials, then several seeds on the test set.

python -m benchmarks.algorithms [--study=cnn,lstm,vae,cifar] [--seeds=5]

A rule's trials are the learning rates around its customary one by powers of the square root of 10, each falling to 0 by
a cosine. The rate that is best on the validation split is trained again from other seeds. A rule's rates train in one
program, and so do its seeds (`population.py`). The study `cifar` (CIFAR-10, needs TFDS_DATA_DIR) does so at three
batch sizes. Rows of other studies stay in the record.
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

_RULES = ("sgd", "momentum", "nesterov", "adagrad", "adam", "muon")


@dataclasses.dataclass(frozen=True)
class Study:
    """A network and its data, at several batch sizes.

    Attributes:
      what: in words.
      experiment: whose it is.
      config: but for the optimiser and the batch size.
      batch_sizes: each with rates of its own.
      reach: how many rates are tried on either side of the customary one.
    """

    what: str
    experiment: Experiment
    config: Config
    batch_sizes: tuple[int, ...]
    reach: int


def studies() -> dict[str, Study]:
    """By name: the first three take a few minutes each on two cores, the last about 40."""
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


STUDY = flags.DEFINE_list("study", list(studies()), f"which of them: {', '.join(studies())}")
flags.register_validator("study", lambda names: set(names) <= set(studies()), f"use {', '.join(studies())}")


def measure(study: Study, rule: str, batch_size: int, seeds: int) -> dict[str, Any]:
    """One row: the rates tried and how they did in validation, and the test figures of the best."""
    config: Any = copy.deepcopy(study.config)
    config.batch_size, config.optimizer = batch_size, OptimizerConfig(name=rule, schedule="cosine")
    customary = optimizers.DEFAULTS[rule].learning_rate
    rates = [customary * 10 ** (k / 2) for k in range(-study.reach, study.reach + 1)]
    tried = trials.train(study.experiment, config, [{"optimizer.learning_rate": rate} for rate in rates])
    chosen = rates[trials.best(tried)]
    again = [{"optimizer.learning_rate": chosen, "seed": seed} for seed in range(1, seeds + 1)]
    figure = "accuracy" if "accuracy" in tried[trials.best(tried)] else "loss"
    values = [run.get(figure) for run in trials.train(study.experiment, config, again, test=True)]
    return {
        "what": study.what,
        "rule": rule,
        "batch_size": batch_size,
        "figure": figure,
        "rates": rates,
        "validation": [run.get(figure) for run in tried],
        "learning_rate": chosen,
        "test": values,
        **several_seeds.spread(values),
    }


def line(row: dict[str, Any]) -> str:
    """One row as Markdown."""
    return (
        f"| {row['what']} | {row['batch_size']} | {row['rule']} | {row['learning_rate']:.2g} | "
        f"{row['figure']} {several_seeds.shown(row)} |"
    )


def picture(rows: list[dict[str, Any]]) -> Any:
    """The test figure of each rule, mean and standard deviation; a panel a study, a colour a batch size."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row["what"] for row in rows))
    figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
    for what, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        shown = [row for row in rows if row["what"] == what and row["standard_deviation"] is not None]
        for batch_size in dict.fromkeys(row["batch_size"] for row in shown):
            line = [row for row in shown if row["batch_size"] == batch_size]
            figures = ([row[key] for row in line] for key in ("rule", "mean", "standard_deviation"))
            axes.errorbar(*figures, fmt="o", capsize=4, label=f"batch {batch_size:,}")
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
                anew = measure(study, rule, batch_size, several_seeds.SEEDS.value)
                print(line(anew), flush=True)
                rows = output.merge(out, "algorithms", [anew], ("what", "rule", "batch_size"))
    picture(rows).savefig(out / "algorithms.png", dpi=100)


if __name__ == "__main__":
    command.start(main)
