"""Study: does depth help a hierarchical VAE? Bits per dimension with 4 to 32 groups of latents.

python -m benchmarks.depth [--seeds=5] [--steps=1400]

Each network is that of `experiments.image_vae` with another number of groups, and a width that keeps the number of
parameters within 10%. All train by its default recipe on the same number of images of CIFAR-10. FLOPs are those of the
compiled step times the number of steps.
"""

from typing import Any

import joblib
from absl import flags

from benchmarks import command, output, several_seeds, trials
from research.config import DatasetConfig
from research.record import drawing

NETWORKS = {"1,1,2,0": 64, "2,2,4,0": 44, "4,4,8,0": 32, "8,8,16,0": 22}  # groups by resolution, and the width
_EXPERIMENT = "experiments.image_vae"
STEPS = flags.DEFINE_integer("steps", 1400, "updates of each run, of 16 images each", lower_bound=1)


def flags_of(groups: str, steps: int) -> list[str]:
    """Returns the command line of one network, without seed and workdir."""
    model = [f"--config.model.groups={groups}", f"--config.model.width={NETWORKS[groups]}"]
    return [*model, f"--config.num_steps={steps}", "--config.dataset.name=cifar10", "--config.final_samples=0"]


def row(groups: str, steps: int, seeds: int) -> dict[str, Any]:
    """Measures one network."""
    return {
        "groups": sum(map(int, groups.split(","))),
        "by_resolution": groups,
        "width": NETWORKS[groups],
        **several_seeds.measure(_EXPERIMENT, flags_of(groups, steps), "test_bits_per_dim", seeds),
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    return (
        f"| {row['groups']} | {row['width']} | {row['parameters']:,} | {row['flops'] / 1e12:.1f} | "
        f"{several_seeds.shown(row)} |"
    )


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots bits per dimension by the number of groups."""
    figure = drawing.figure(5, 3.8)
    axes: Any = figure.subplots()
    columns = ([row[name] for row in rows] for name in ("groups", "mean", "standard_deviation"))
    axes.errorbar(*columns, fmt="o-", capsize=3)
    axes.set(xlabel="groups of latents", ylabel="bits per dimension, test", xscale="log")
    axes.set_xticks([row["groups"] for row in rows], [str(row["groups"]) for row in rows])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    out, rows = output.folder(), []
    trials.check_data([DatasetConfig(name="cifar10")])
    print("| groups | width | parameters | TFLOP, training | test bits per dimension |")
    print("| --- | --- | --- | --- | --- |")
    for groups in NETWORKS:
        rows.append(row(groups, STEPS.value, several_seeds.SEEDS.value))
        print(line(rows[-1]), flush=True)
        record = {"cores": joblib.cpu_count(), "steps": STEPS.value, "rows": rows}
        output.write(out, "depth", record)
    drawing.save(out / "depth.png", lambda: plot(rows))


if __name__ == "__main__":
    command.start(main)
