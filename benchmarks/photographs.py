"""Trains ResNet-18 on photographs, from scratch: this project, and torchvision's network with the same recipe.

python -m benchmarks.photographs --images=DIR [--epochs=24]

DIR has the folders `train` and `test`, with a folder of images for each class. Needs `pip install torchvision`. Both
programs use all cores that this process may use, one program after the other. Seconds are those of training and
evaluation, without compilation; CPU seconds are those of the whole process and its workers, compilation included.
"""

import importlib.util
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import command, output, trials
from research.errors import UserError

_IMAGES = flags.DEFINE_string("images", None, "folder with the folders train and test", required=True)
_EPOCHS = flags.DEFINE_integer("epochs", 24, "epochs of training", lower_bound=1)


def ours(images: Path, epochs: int) -> dict[str, Any]:
    """Trains `experiments.image_classifier`; returns its test accuracy, parameters and seconds."""
    data = ["--config.dataset.name=folder", f"--config.dataset.data_dir={images}"]
    found = trials.summary("experiments.image_classifier", [*data, f"--config.num_epochs={epochs}"])
    seconds = found["wall_seconds"] - found["compile_seconds"]
    return {"test_accuracy": found["test_accuracy"], "parameters": found["num_params"], "seconds": seconds}


def torchvision(images: Path, epochs: int) -> dict[str, Any]:
    """Trains torchvision's network; returns the same."""
    return json.loads(
        command.run("torchvision", ["-m", "benchmarks.peers.torch_photographs", str(images), str(epochs)])
    )


def _row(train: Callable[[Path, int], dict[str, Any]], images: Path, epochs: int) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = train(images, epochs)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"program": train.__name__, "epochs": epochs, **found, "cpu_seconds": cpu_seconds}


def main() -> None:
    out, images = output.folder(), Path(os.path.expanduser(_IMAGES.value)).resolve()
    if missing := [name for name in ("train", "test") if not (images / name).is_dir()]:
        raise UserError(f"--images={images} has no folder {missing[0]}")
    if importlib.util.find_spec("torchvision") is None:
        raise UserError("torchvision is not installed: pip install torchvision")
    print("| program | parameters | epochs | test accuracy | seconds | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    rows = []
    for train in (ours, torchvision):
        rows.append(row := _row(train, images, _EPOCHS.value))
        cells = [row["program"], f"{row['parameters']:,}", str(row["epochs"]), f"{row['test_accuracy']:.1%}"]
        cells += [f"{row[name]:.0f}" for name in ("seconds", "cpu_seconds")]
        print(f"| {' | '.join(cells)} |", flush=True)
        output.write(out, "photographs", {"cores": len(os.sched_getaffinity(0)), "rows": rows})


if __name__ == "__main__":
    command.start(main)
