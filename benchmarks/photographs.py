"""Trains ResNet-18 on photographs, from scratch: this project, and torchvision's network with the same recipe.

python -m benchmarks.photographs --images=DIR [--epochs=24]

DIR has the folders `train` and `test`, with a folder of images for each class. Needs `pip install torchvision`. Both
programs use all cores that this process may use, one program after the other. Seconds are those of training and
evaluation, without compilation; CPU seconds are those of the whole process and its workers, compilation included.
"""

import json
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import command, output
from research.errors import UserError

_IMAGES = flags.DEFINE_string("images", None, "folder with the folders train and test", required=True)
_EPOCHS = flags.DEFINE_integer("epochs", 24, "epochs of training", lower_bound=1)


def _run(name: str, args: Sequence[str]) -> tuple[str, float]:
    """Returns the stdout of `python ARGS`, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = command.run(name, args)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return printed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _ours(images: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as workdir:
        flags_ = ["--config.dataset.name=folder", f"--config.dataset.data_dir={images}"]
        flags_ += [f"--config.num_epochs={_EPOCHS.value}", f"--workdir={workdir}/run"]
        cpu_seconds = _run("image_classifier", ["-m", "experiments.image_classifier", *flags_])[1]
        summary = json.loads(Path(workdir, "run", "summary.json").read_bytes())
    seconds = summary["wall_seconds"] - summary["compile_seconds"]
    found = {"test_accuracy": summary["test_accuracy"], "seconds": seconds}
    return {"program": "experiments.image_classifier", **found, "cpu_seconds": cpu_seconds}


def _theirs(images: Path) -> dict[str, Any]:
    args = ["-m", "benchmarks.peers.torch_photographs", str(images), str(_EPOCHS.value)]
    printed, cpu_seconds = _run("torchvision", args)
    return {"program": "torchvision", **json.loads(printed), "cpu_seconds": cpu_seconds}


def main() -> None:
    out, images = output.folder(), Path(os.path.expanduser(_IMAGES.value)).resolve()
    if missing := [name for name in ("train", "test") if not (images / name).is_dir()]:
        raise UserError(f"--images={images} has no folder {missing[0]}")
    print("| program | epochs | test accuracy | seconds | CPU seconds |\n| --- | --- | --- | --- | --- |")
    rows = []
    for run in (_ours, _theirs):
        rows.append(row := run(images) | {"epochs": _EPOCHS.value})
        cells = (row["program"], row["epochs"], f"{row['test_accuracy']:.1%}")
        print(f"| {' | '.join(map(str, cells))} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} |", flush=True)
        output.write(out, "photographs", {"cores": len(os.sched_getaffinity(0)), "rows": rows})


if __name__ == "__main__":
    command.start(main)
