"""Study: does depth help a hierarchical VAE? Bits per dimension with 4 to 32 groups of latents.

python -m benchmarks.depth [--steps=1400] [--rates=0.004,0.008]

Each network is that of `experiments.image_vae` with another number of groups, and a width that keeps the number of
parameters within 10%. Each is trained once with each learning rate, otherwise by the default recipe, on the same number
of images of CIFAR-10. FLOPs are those of the model in one step times the number of steps.
"""

from collections.abc import Sequence
from typing import Any

import joblib
from absl import flags

from benchmarks import command, output, trials
from research.config import DatasetConfig
from research.errors import NonFiniteLossError, UserError
from research.record import drawing

NETWORKS = {"1,1,2,0": 64, "2,2,4,0": 44, "4,4,8,0": 32, "8,8,16,0": 22}  # groups by resolution, and the width
_EXPERIMENT = "experiments.image_vae"
STEPS = flags.DEFINE_integer("steps", 1400, "updates of each run", lower_bound=1)
RATES = flags.DEFINE_list("rates", ["0.004", "0.008"], "learning rates")


def flags_of(groups: str, steps: int, rate: float) -> list[str]:
    """Returns the command line of one run, without workdir."""
    model = [f"--config.model.groups={groups}", f"--config.model.width={NETWORKS[groups]}"]
    run = [f"--config.num_steps={steps}", f"--config.optimizer.learning_rate={rate}"]
    return [*model, *run, "--config.dataset.name=cifar10", "--config.final_samples=0"]


def row(groups: str, steps: int, rates: Sequence[float]) -> dict[str, Any]:
    """Measures one network; results are None for learning rates at which training diverged.

    Raises:
      UserError: training diverged at every learning rate.
    """
    runs = [_summary(groups, steps, rate) for rate in rates]
    trained = [run for run in runs if run]
    if not trained:
        raise UserError(
            f"--rates={','.join(map(str, rates))}: {groups} diverged at every learning rate: add smaller ones"
        )
    return {
        "groups": sum(map(int, groups.split(","))),
        "by_resolution": groups,
        "width": NETWORKS[groups],
        "parameters": trained[0]["num_params"],
        "flops": steps * trained[0]["model_flops_per_step"],
        **{name: [run.get(name) for run in runs] for name in ("train_seconds", "test_bits_per_dim")},
    }


def _summary(groups: str, steps: int, rate: float) -> dict[str, Any]:
    try:
        return trials.summary(_EXPERIMENT, flags_of(groups, steps, rate))
    except command.CommandError as error:
        if error.exit_code != NonFiniteLossError.exit_code:
            raise
        return {}


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    bits = " | ".join(f"{value:.2f}" if value else "diverged" for value in row["test_bits_per_dim"])
    return f"| {row['groups']} | {row['width']} | {row['parameters']:,} | {row['flops'] / 1e12:.1f} | {bits} |"


def plot(rows: list[dict[str, Any]], rates: Sequence[float]) -> Any:
    """Plots bits per dimension by the number of groups."""
    figure = drawing.figure(5, 3.8)
    axes: Any = figure.subplots()
    groups = [row["groups"] for row in rows]
    for i, rate in enumerate(rates):
        bits = [row["test_bits_per_dim"][i] or float("nan") for row in rows]
        axes.plot(groups, bits, "o-", label=f"learning rate {rate:g}")
    axes.set(xlabel="groups of latents", ylabel="bits per dimension, test", xscale="log")
    axes.set_xticks(groups, list(map(str, groups)))
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    rates, out, rows = command.numbers("rates", RATES.value), output.folder(), []
    trials.check_data([DatasetConfig(name="cifar10")])
    print(f"| groups | width | parameters | TFLOP, training | {' | '.join(f'{rate:g}' for rate in rates)} |")
    print("| --- " * (4 + len(rates)) + "|")
    for groups in NETWORKS:
        rows.append(row(groups, STEPS.value, rates))
        print(line(rows[-1]), flush=True)
        record = {"cores": joblib.cpu_count(), "steps": STEPS.value, "rates": rates, "rows": rows}
        output.write(out, "depth", record)
    drawing.save(out / "depth.png", lambda: plot(rows, rates))


if __name__ == "__main__":
    command.start(main)
