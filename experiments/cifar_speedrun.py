"""Time to accuracy on CIFAR-10: repeated runs, each timed from the first train step to the test accuracy.

python -m experiments.cifar_speedrun                      airbench94's network at full width, for a GPU: 20 runs
python -m experiments.cifar_speedrun --config=airbench96  airbench96's network, deeper and wider, trained for longer
python -m experiments.cifar_speedrun --config=quick       the tutorial CNN in one epoch, for a CPU: 5 runs

Run i has the seed `seed` + i. The time excludes compilation, as in airbench (Jordan 2024, arXiv 2404.00498, section 2),
and includes the evaluation after the last step. speedrun.json has the results and is rewritten after every run.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import cifar_cnn
from experiments.cifar_cnn import CifarConfig
from research import app
from research.config import AugmentConfig, CNNConfig, OptimizerConfig, option, walk
from research.data import sources
from research.data.sources import Dataset
from research.errors import UserError
from research.process.signals import Signals, StoppedError
from research.record import storage
from research.record.workdir import Workdir
from research.record.writer import Writer
from research.tasks.classification import Classification
from research.training.run import Training


@dataclasses.dataclass
class SpeedrunConfig(CifarConfig):
    """Repeated runs of image classification."""

    num_runs: int = option(20, "runs, each with another seed", minimum=1)


def airbench94() -> SpeedrunConfig:
    """The airbench network (Jordan 2024, section 3) in bfloat16: eight epochs of 2,000 images per step, by Muon.

    The channels, the initialization, the augmentation, the batch size, the epochs, Muon's learning rate and momentum,
    and the test-time views are those of airbench94_muon.py. The differences are:

    - Muon takes five Newton-Schulz steps in float32; there, three in bfloat16. Optax corrects the momentum's bias.
    - Biases are trained by Adam at a tenth of Muon's rate, the classifier by Muon; there, both by Nesterov SGD
      (momentum 0.85) at rates of 0.053 and 0.67.
    - The weight decay is 0.3 for all kernels; there, rate times decay is 0.004 for the biases and the classifier, and
      the convolutions have no decay.
    - The bias after whitening starts at 0 and is trained throughout; there, it starts at PyTorch's random values, and
      its rate decays to 0 within three epochs.
    - The classifier's kernel has PyTorch's default initialization and the logits are divided by 9; there, the kernel is
      scaled to a standard deviation of 1 and the logits are divided by 256. The initial logits are equally large.
    - Parameters are float32 and the computation is bfloat16; there, everything but batch norm is float16.
    - The images that are flipped in the first epoch are the same in every run; there, each run draws them.
    - The clock starts at the first train step; there, it includes computing the whitening kernel.
    """
    return SpeedrunConfig(
        num_epochs=8,
        batch_size=2000,
        optimizer=OptimizerConfig(
            name="muon", learning_rate=0.24, momentum=0.6, weight_decay=0.3, fixed_norm=True, schedule="linear"
        ),
        label_smoothing=0.2,
        mirror=True,
        translate=True,
        model=CNNConfig(name="airbench", dtype="bfloat16"),
        augment=cifar_cnn.airbench().augment,
    )


def airbench96() -> SpeedrunConfig:
    """The network of airbench96 (128/384/512 channels, three convolutions per group) with the recipe of `airbench94`.

    The network, the shifts by up to four pixels and the cutout's side of 12 are those of airbench96_faster.py. The
    training recipe is not: 34 epochs of 2,000 images per step by Muon, chosen with a narrower network and not tuned
    again. There:

    - Nesterov SGD (momentum 0.85) trains everything, the biases of batch norm at 64 times the rate of the rest, with
      a warm-up over the first tenth of the steps, and Lookahead averages the parameters every five steps.
    - A proxy network (32/64/64 channels, two convolutions per group) is trained first, within the measured time. In
      each of the 45 epochs, the 512 of every 1,024 examples that had the largest loss in the proxy are trained on.
    - The cutout's square lies within the image, its corner drawn uniformly. Here it is centered at a uniformly drawn
      pixel and clipped at the borders (DeVries & Taylor 2017): it covers 118 pixels on average, not 144.
    - Everything but batch norm is float16, and the time includes computing the whitening kernel, as in
      airbench94_muon.py. The bias after whitening starts at 0 and is trained throughout, as here: the code's switch
      after three epochs compares the epoch with a number of steps that it never reaches.

    The time and accuracy of this preset have not been measured on a GPU yet.
    """
    config = airbench94()
    config.num_epochs = 34
    config.model.depth = 3
    config.augment = AugmentConfig(crop=4, flip="alternating", cutout=12)
    return config


def quick() -> SpeedrunConfig:
    """Five runs of `experiments.cifar_cnn --config=quick`."""
    return SpeedrunConfig(**vars(cifar_cnn.quick()), num_runs=5)


def make_task(config: CifarConfig, dataset: Dataset) -> Classification:
    """Builds the task of `experiments.cifar_cnn`, with the published momentum of airbench's batch norm.

    This is the fraction of the running statistics that a step keeps: 0.6 in airbench94_muon.py (which passes
    `1 - momentum` to PyTorch) and 0.9, PyTorch's default, in airbench96_faster.py.
    """
    return cifar_cnn.make_task(config, dataset, norm_momentum=0.9 if config.model.depth == 3 else 0.6)


def run(experiment: app.Experiment, argv: Sequence[str], signals: Signals) -> dict[str, Any]:
    """Runs the speedrun of the command line.

    Returns:
      The contents of speedrun.json.

    Raises:
      UserError: bad input, found before the first run.
      NonFiniteLossError: a run diverged; speedrun.json has the runs before it.
      StoppedError: a stop signal was received; speedrun.json has the finished runs.
    """
    command = app.parse(experiment, argv)
    if command.describe:
        return app.run(experiment, argv, signals)
    config: Any = command.config
    path = command.workdir / "speedrun.json"
    _check(command, path)
    mesh = app.start(config)
    if jax.process_count() > 1:
        raise UserError("a speedrun runs in one process: start it without a launcher")
    with Workdir(command.workdir):
        dataset = sources.load(config.dataset)
        config = experiment.resolve(config, dataset)
        runs: list[dict[str, Any]] = []
        for number in range(config.num_runs):
            seeded = dataclasses.replace(config, seed=config.seed + number)
            runs.append(_run(seeded, dataset, mesh, command.workdir, signals))
            print(f"run {number + 1}/{config.num_runs}  {_line(runs[-1])}", flush=True)
            summary = _summary(runs) | {"device_kind": mesh.devices.flat[0].device_kind, "device_count": mesh.size}
            summary |= {"config": dataclasses.asdict(config), "runs": runs}
            storage.replace(path, (json.dumps(summary, indent=2) + "\n").encode())
    print(_last_lines(summary, path))
    return summary


def _check(command: app.Command, path: Any) -> None:
    """Raises `UserError` for flags that a speedrun does not support."""
    if command.mode != "train" or command.reproduces or command.trackers or command.profile:
        raise UserError(
            "a speedrun starts a new run without a record: remove --mode, --reproduce, --tracker and --profile"
        )
    if path.exists() or command.earlier:
        raise UserError(f"--workdir={command.workdir} holds another run: give a new folder")
    config: Any = command.config
    if config.seed + config.num_runs > 2**32:
        raise UserError(f"--config.seed={config.seed}: the seed of the last run must be below 2**32")
    for path, field, value in walk(config):
        if field.metadata["record_only"] and value != field.default:
            raise UserError(f"--config.{path}: a speedrun records nothing but speedrun.json; remove the flag")


def _run(config: Any, dataset: Dataset, mesh: Any, workdir: Path, signals: Signals) -> dict[str, Any]:
    """Trains and evaluates once, without files; returns the seed, the accuracies and the times."""
    training = Training(config, make_task(config, dataset), dataset, mesh, signals)
    end = training.epoch_end_steps[-1]
    if line := training.start_from_weights():
        print(line, flush=True)
    with jax.set_mesh(mesh), Writer(workdir, end, active=True) as writer:
        compile_seconds = training.compile(train=True)
        with signals.deferred():
            start = time.monotonic()
            for step, values in training.dispatches(end):
                speed = step * config.batch_size / (time.monotonic() - start)
                writer.progress(step, float(values["loss"].mean()), speed)
            if signals.received:
                raise StoppedError(f"stopped by {signals.received.name}: the finished runs are kept", signals.received)
            results = training.evaluate()
            seconds = time.monotonic() - start
    return {"seed": config.seed, **results, "seconds": seconds, "compile_seconds": compile_seconds}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["test_accuracy"] for run in runs]
    return {
        "num_runs": len(runs),
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(runs) > 1 else 0.0,
        "seconds_median": statistics.median(run["seconds"] for run in runs),
    }


def _line(run: dict[str, Any]) -> str:
    return f"test accuracy {run['test_accuracy']:.4f} after {run['seconds']:.2f} s"


def _last_lines(summary: dict[str, Any], path: Path) -> str:
    error = summary["accuracy_std"] / math.sqrt(summary["num_runs"])
    return (
        f"{summary['num_runs']} runs: test accuracy {summary['accuracy_mean']:.4f} (standard deviation "
        f"{summary['accuracy_std']:.4f}, standard error {error:.4f}) after {summary['seconds_median']:.2f} s (median), "
        f"{summary['device_count']} {summary['device_kind']}\n  record: {path}"
    )


EXPERIMENT = app.Experiment(
    "cifar_speedrun",
    str(__doc__),
    {"airbench94": airbench94, "airbench96": airbench96, "quick": quick},
    make_task,
    complete=cifar_cnn.complete,
    run=run,
)

if __name__ == "__main__":
    app.main(EXPERIMENT)
