"""Time to accuracy on CIFAR-10: `experiments.cifar_speedrun` against airbench, on the same GPU and images.

python -m benchmarks.speedrun --airbench=DIR [--goal=94] [--runs=20]

DIR is a clone of github.com/KellerJordan/cifar10-airbench; the goal is the accuracy in percent that its script reaches
on the original images. Each side is one process that compiles first, which is timed separately, and then trains
repeatedly with different seeds. The seconds are from the first train step to the test accuracy. It needs PyTorch.
"""

import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import command, output
from research.config import DatasetConfig
from research.data import sources

PEERS = {"94": "airbench94_muon", "96": "airbench96_faster"}

AIRBENCH = flags.DEFINE_string("airbench", None, "folder of airbench's scripts", required=True)
GOAL = flags.DEFINE_enum("goal", "94", list(PEERS), "accuracy in percent")
RUNS = flags.DEFINE_integer("runs", 20, "number of runs of each side", lower_bound=2)


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the runs: mean accuracy with standard error, median seconds."""
    accuracies, seconds = ([run[key] for run in runs] for key in ("test_accuracy", "seconds"))
    return {
        "name": name,
        "runs": len(runs),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_standard_error": statistics.stdev(accuracies) / math.sqrt(len(runs)),
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def line(found: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    accuracy = f"{found['accuracy_mean']:.4f} ± {found['accuracy_standard_error']:.4f}"
    seconds = f"{found['seconds_median']:.3f} ({found['seconds_min']:.3f} to {found['seconds_max']:.3f})"
    return f"| {found['name']} | {found['runs']} | {accuracy} | {seconds} |"


def main() -> None:
    out, runs = output.folder(), str(RUNS.value)
    peer, preset = PEERS[GOAL.value], f"--config=airbench{GOAL.value}"
    script = Path(os.path.expanduser(AIRBENCH.value)) / f"{peer}.py"
    if not script.exists():
        raise SystemExit(f"error: --airbench={AIRBENCH.value} has no {script.name}")
    dataset = sources.load(DatasetConfig(name="cifar10"))
    with tempfile.TemporaryDirectory() as folder:
        arrays = {f"{s}_{n}": x for s in ("train", "test") for n, x in getattr(dataset, s).items() if n != "id"}
        np.savez(f"{folder}/data.npz", **arrays)  # pyright: ignore[reportArgumentType]
        print("| program | runs | test accuracy | seconds, median |\n| --- | --- | --- | --- |")
        flags_ = [preset, "--config.dataset.name=cifar10", f"--config.num_runs={runs}", f"--workdir={folder}/runs"]
        command.run("cifar_speedrun", ["-m", "experiments.cifar_speedrun", *flags_])
        ours = json.loads(Path(f"{folder}/runs/speedrun.json").read_bytes())
        rows = [row(f"experiments.cifar_speedrun {preset}", ours["runs"])]
        rows[0]["warm_up_seconds"] = ours["runs"][0]["compile_seconds"]
        record = {"device": ours["device_kind"], "rows": rows}
        output.write(out, f"speedrun_{GOAL.value}", record)
        print(line(rows[0]), flush=True)
        args = ["-m", "benchmarks.peers.torch_airbench", str(script), runs, f"{folder}/data.npz"]
        theirs = json.loads(command.run(peer, args))
        rows.append(row(peer, theirs["runs"]) | {"warm_up_seconds": theirs["warm_up_seconds"]})
        output.write(out, f"speedrun_{GOAL.value}", record)
        print(line(rows[1]))


if __name__ == "__main__":
    command.start(main)
