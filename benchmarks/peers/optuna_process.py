"""`python -m benchmarks.peers.optuna_process PEER FOLDER`: an Optuna sweep with one peer; prints its values as JSON."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import optuna


def main(peer: str, folder: str) -> None:
    work = json.loads((Path(folder) / "work.json").read_bytes())
    with np.load(Path(folder) / "arrays.npz") as loaded:
        arrays = dict(loaded)
    train = importlib.import_module(f"benchmarks.peers.{peer}_trial").validation_accuracy

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("rate", min(work["rates"]), max(work["rates"]), log=True)
        return train(work["network"], arrays, rate, work["epochs"], work["batch_size"])

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for rate in work["rates"]:
        study.enqueue_trial({"rate": rate})
    study.optimize(objective, n_trials=len(work["rates"]))
    print(json.dumps([trial.value for trial in study.trials]))


if __name__ == "__main__":
    main(*sys.argv[1:])
