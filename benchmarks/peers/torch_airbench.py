"""`python -m benchmarks.peers.torch_airbench SCRIPT RUNS DATA`: runs airbench on given images, timed by its own clock.

SCRIPT is airbench94_muon.py or airbench96_faster.py of https://github.com/KellerJordan/cifar10-airbench, DATA the
arrays saved by `benchmarks.speedrun`. Prints JSON: each run's accuracy with test-time augmentation and its seconds, and
the seconds of the warm-up.
"""

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def _save(path: Path, folder: Path) -> None:
    """Writes the images in the script's cache format, so that it does not download them."""
    with np.load(path) as arrays:
        for split in ("train", "test"):
            images, labels = (torch.from_numpy(arrays[f"{split}_{name}"]) for name in ("image", "label"))
            torch.save({"images": images, "labels": labels.long(), "classes": list(range(10))}, folder / f"{split}.pt")


def _trainer(module: Any) -> Callable[[Any], float]:
    """Returns a function that trains once and returns the accuracy; compiles the networks as the script's main does."""
    if hasattr(module, "CifarNet"):
        model = module.CifarNet().cuda().to(memory_format=torch.channels_last)
        model.compile(mode="max-autotune")
        return lambda run: module.main(run, model)
    proxy, train_bias, freeze_bias = (module.make_net(module.hyp[name]) for name in ("proxy", "net", "net"))
    for model in (proxy, freeze_bias):
        model[0].bias.requires_grad = False
    models = [torch.compile(model, mode="max-autotune") for model in (proxy, train_bias, freeze_bias)]
    return lambda run: module.main(run, module.hyp, *models)


def main(script: str, runs: str, data: str) -> None:
    path, count, arrays = Path(script).resolve(), int(runs), Path(data).resolve()
    sys.argv = [str(path)]  # the script reads its own source
    spec = importlib.util.spec_from_file_location("airbench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("cifar10").mkdir()
        _save(arrays, Path("cifar10"))
        train = _trainer(module)
        start = time.monotonic()
        done = []
        for run in ["warmup", *range(count)]:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                accuracy = train(run)
            (last,) = [line for line in printed.getvalue().splitlines() if "eval" in line][-1:]
            done.append({"test_accuracy": accuracy, "seconds": float(last.split("|")[-2])})
            if run == "warmup":
                warm_up = time.monotonic() - start
    print(json.dumps({"runs": done[1:], "warm_up_seconds": warm_up}))


if __name__ == "__main__":
    main(*sys.argv[1:])
