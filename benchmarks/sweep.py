"""Trials per minute on the digits: this project's sweep against Optuna with Keras and Optuna with PyTorch.

pip install -e ".[bench]" && python -m benchmarks.sweep [--trials=32] [--epochs=3] [--rounds=3]

All three train the same network by Adam with the same learning rates and epochs, and evaluate it on the same validation
split. They take turns, each in its own process. The time is the process's wall time, including imports, compilation
(with an empty cache), and this project's report and final run of the best trial. A ratio is this project's trials per
minute over the peer's in the same round.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import command, output

Run = dict[str, float]
OURS, PEERS = "meshwork", ("keras", "torch")
MODULES = {"cnn": ["experiments.cifar_cnn", "--config=tutorial"], "mlp": ["benchmarks.mlp"]}
_BATCH = 32
NEAR = 0.05  # maximum difference of the best accuracies, else the work was not the same

WORK = flags.DEFINE_list("work", list(MODULES), f"networks to train: {', '.join(MODULES)}")
TRIALS = flags.DEFINE_integer("trials", 32, "trials of a sweep", lower_bound=2)
EPOCHS = flags.DEFINE_integer("epochs", 3, "epochs of a trial", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "how many times each side is run", lower_bound=1)
flags.register_validator("work", lambda names: set(names) <= set(MODULES), f"use {', '.join(MODULES)}")


def works() -> list[dict[str, Any]]:
    """Returns the works of the flags: the networks, with the learning rates of their trials."""
    rates = np.geomspace(1e-4, 1e-2, TRIALS.value).round(7).tolist()
    common = {"rates": rates, "epochs": EPOCHS.value, "batch_size": _BATCH}
    return [{"network": network, **common} for network in WORK.value]


def training(work: dict[str, Any]) -> list[str]:
    """Returns the training module and the flags common to all trials."""
    return [
        *MODULES[work["network"]],
        "--config.dataset.name=digits",
        f"--config.num_epochs={work['epochs']}",
        f"--config.batch_size={work['batch_size']}",
    ]


def arguments(name: str, work: dict[str, Any], folder: Path) -> list[str]:
    """Returns Python's arguments for a sweep."""
    if name != OURS:
        return ["-m", "benchmarks.peers.optuna_process", name, str(folder)]
    rates = ",".join(map(str, work["rates"]))
    return [
        *("-m", "launch.sweep", *training(work)),
        *("--sampler=grid", f"--search=optimizer.learning_rate=[{rates}]", f"--workdir={folder / 'sweep'}"),
    ]


def run(name: str, work: dict[str, Any], arrays: dict[str, np.ndarray]) -> Run:
    """Runs one sweep in a subprocess; returns its seconds and its best accuracy.

    Raises:
      SystemExit: the sweep failed.
    """
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
        np.savez(folder / "arrays.npz", **arrays)  # pyright: ignore[reportArgumentType]
        environment = {"MESHWORK_CACHE_DIR": str(folder / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3"}
        start = time.monotonic()
        printed = command.run(name, arguments(name, work, folder), environment)
        seconds = time.monotonic() - start
        if name == OURS:
            return {"seconds": seconds, "best": json.loads((folder / "sweep/sweep.json").read_bytes())["best_value"]}
        return {"seconds": seconds, "best": max(json.loads(printed.splitlines()[-1]))}


def examples() -> dict[str, np.ndarray]:
    """Loads the digits as a sweep splits them.

    Returns:
      "train_image" and "validation_image", float32 [n, 32, 32, 1], normalized, and "train_label", "validation_label".
    """
    from research.config import DatasetConfig
    from research.data import images, sources

    dataset = sources.load(DatasetConfig(name="digits", validation_fraction=0.1))
    assert dataset.validation is not None
    statistics_ = images.channel_statistics(dataset.train["image"])
    found = {}
    for name, split in (("train", dataset.train), ("validation", dataset.validation)):
        found[f"{name}_image"] = np.asarray(images.normalize(split["image"], *statistics_))
        found[f"{name}_label"] = split["label"]
    return found


def row(work: dict[str, Any], peer: str, ours: list[Run], theirs: list[Run]) -> dict[str, Any]:
    """Compares this project with one peer.

    Raises:
      SystemExit: their accuracies differ, so they did not do the same work.
    """
    for mine, other in zip(ours, theirs):
        if abs(mine["best"] - other["best"]) > NEAR:
            raise SystemExit(
                f"error: {work['network']} with {peer} is not the same work: the best accuracy is {mine['best']:.3f} "
                f"here, {other['best']:.3f} there"
            )
    speeds = [[60 * len(work["rates"]) / one["seconds"] for one in runs] for runs in (ours, theirs)]
    ratios = [a / b for a, b in zip(*speeds)]
    return {
        "work": work["network"],
        "peer": peer,
        "trials": len(work["rates"]),
        "epochs": work["epochs"],
        "batch_size": work["batch_size"],
        "trials_per_minute": round(statistics.median(speeds[0]), 1),
        "peer_trials_per_minute": round(statistics.median(speeds[1]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "rounds": len(ratios),
        "best_accuracy": ours[0]["best"],
        "peer_best_accuracy": theirs[0]["best"],
    }


def main() -> None:
    out, arrays = output.folder(), examples()
    rows: list[dict[str, Any]] = []
    for work in works():
        runs: dict[str, list[Run]] = {name: [] for name in (OURS, *PEERS)}
        for number in range(ROUNDS.value):
            for name, done in runs.items():
                done.append(run(name, work, arrays))
                print(f"round {number + 1}  {work['network']}  {name:<9} {done[-1]['seconds']:7.1f} s", flush=True)
        new_rows = [row(work, peer, runs[OURS], runs[peer]) for peer in PEERS]
        rows = output.merge(out, "sweep", new_rows, ("work", "peer", "trials"))
    for found in rows:
        print(
            f"{found['work']}: {found['trials_per_minute']} trials per minute, Optuna with {found['peer']} "
            f"{found['peer_trials_per_minute']}: {found['ratio']} times ({found['ratio_min']} to {found['ratio_max']})"
        )


if __name__ == "__main__":
    command.start(main)
