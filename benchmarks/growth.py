"""Time and memory of a train step by batch size, width, depth and sequence length, compared with its FLOPs.

python -m benchmarks.growth [--out=benchmarks/results]

If the time is proportional to the work, all rows of a case have the same GFLOP/s. FLOPs are those of the compiled step,
with every iteration of its loops counted. Memory is that of the step's temporaries. The data is noise.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import command, output
from experiments import char_rnn, cifar_cnn, sequential_images
from experiments.char_rnn import CharRNNConfig
from experiments.cifar_cnn import CifarConfig
from experiments.sequential_images import SequentialImagesConfig
from launch.plans.hlo import Program
from research import sharding
from research.config import CNNConfig, Config, OptimizerConfig, RecurrentConfig, RNNConfig
from research.data.sources import Dataset
from research.record import drawing
from research.training.run import Training

_UNITS = 128
_PIXEL_UNITS, _PIXEL_BATCH = 64, 8
_DISPATCHES, _SECONDS = 5, 0.5  # number of timed dispatches, and the approximate time of each
_EXPERIMENTS = {
    CifarConfig: cifar_cnn.EXPERIMENT,
    CharRNNConfig: char_rnn.EXPERIMENT,
    SequentialImagesConfig: sequential_images.EXPERIMENT,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One train step to be timed.

    Attributes:
      grows: the varied quantity; cases with the same one differ in nothing else.
      size: its value.
      config: the experiment's config.
    """

    grows: str
    size: int
    config: Config


def cases() -> Iterator[Case]:
    """Yields the train steps to be timed."""
    sgd = OptimizerConfig(name="momentum")

    def cnn(batch_size: int, **model: Any) -> Config:
        return CifarConfig(batch_size=batch_size, num_epochs=1, optimizer=sgd, model=CNNConfig(**model))

    for size in (16, 32, 64, 128, 256):
        yield Case("batch size, the tutorial CNN", size, cnn(size, name="simple"))
    for size in (8, 16, 32, 64, 128):
        yield Case("width, the tutorial CNN", size, cnn(32, name="simple", width=size))
    for size in (10, 16, 22, 28):
        yield Case("depth, a wide ResNet of width 1", size, cnn(16, name="wide_resnet", width=1, depth=size))
    for size in (32, 64, 128, 256, 512):
        model = RNNConfig(name="lstm", width=_UNITS, layers=1)
        config = CharRNNConfig(batch_size=32, num_epochs=1, sequence_length=size, optimizer=sgd, model=model)
        yield Case(f"sequence length, an LSTM of {_UNITS} units", size, config)
    for name in ("lstm", "mingru", "lru"):
        for size in (16**2, 28**2, 64**2):
            model = RecurrentConfig(name=name, width=_PIXEL_UNITS, layers=1)
            config = SequentialImagesConfig(batch_size=_PIXEL_BATCH, num_epochs=1, optimizer=sgd, model=model)
            yield Case(f"pixels, {name} of {_PIXEL_UNITS} units", size, config)


def _dataset(case: Case, steps: int) -> Dataset:
    config = case.config
    rng, count = np.random.default_rng(0), config.batch_size * steps
    if isinstance(config, CharRNNConfig):
        length = config.sequence_length
        train = {
            "tokens": rng.integers(0, 64, (count, length + 1)).astype(np.uint8),
            "first": np.ones(count, bool),
            "count": np.full(count, length, np.int32),
        }
    else:
        is_sequence = isinstance(config, SequentialImagesConfig)
        shape = (math.isqrt(case.size), math.isqrt(case.size), 1) if is_sequence else (32, 32, 3)
        images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
        train = {"image": images, "label": rng.integers(0, 10, count).astype(np.int32)}
    test = {name: array[: config.batch_size] for name, array in train.items()}
    return Dataset("noise", tuple(map(str, range(64))), train, None, test, shuffle=False)


def _training(case: Case, steps: int) -> Training:
    config = dataclasses.replace(case.config, steps_per_dispatch=steps, num_epochs=_DISPATCHES + 1)
    dataset = _dataset(case, steps)
    experiment = _EXPERIMENTS[type(config)]
    config = experiment.resolve(config, dataset)
    return Training(
        config, experiment.make_task(config, dataset), dataset, sharding.make_mesh(config, jax.devices()[:1])
    )


def _seconds(training: Training) -> list[float]:
    """Runs all epochs, of one dispatch each, and returns the seconds of each."""
    seconds = []
    for end in training.epoch_end_steps:
        start = time.monotonic()
        for _ in training.dispatches(end):
            pass
        seconds.append(time.monotonic() - start)
    return seconds


def measure(case: Case) -> dict[str, Any]:
    """Measures one row of the table."""
    probe = _training(case, 1)
    with jax.set_mesh(probe.mesh):
        probe.compile(train=True)
        steps = max(1, int(_SECONDS / min(_seconds(probe))))
        training = _training(case, steps)
        training.compile(train=True)
        flops = Program(training.train_program.as_text()).cost()["flops"]
        seconds = statistics.median(_seconds(training)[1:]) / steps
        memory = training.train_program.memory_analysis().temp_size_in_bytes
    return {
        "grows": case.grows,
        "size": case.size,
        "gflop": flops / 1e9,
        "temporary_bytes": memory,
        "seconds_per_step": seconds,
        "gflop_per_second": flops / 1e9 / seconds,
    }


def line(row: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    return (
        f"| {row['grows']} | {row['size']} | {row['gflop']:.3f} | {row['temporary_bytes'] / 2**20:,.1f} | "
        f"{row['seconds_per_step'] * 1e3:,.2f} | {row['gflop_per_second']:,.0f} |"
    )


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plots time by FLOPs, both logarithmic; dotted: proportional to the FLOPs."""
    figure = drawing.figure(7, 5)
    axes = figure.subplots()
    for grows in dict.fromkeys(row["grows"] for row in rows):
        work, seconds = np.array([(r["gflop"], r["seconds_per_step"]) for r in rows if r["grows"] == grows]).T
        (curve,) = axes.loglog(work, seconds * 1e3, "o-", label=grows)
        axes.loglog(work, seconds[0] * 1e3 * work / work[0], ":", color=curve.get_color())
    axes.set(
        xlabel="GFLOP per step, as compiled", ylabel="milliseconds per step", title="dotted: proportional to the FLOPs"
    )
    axes.legend()
    return figure


def main() -> None:
    out, rows = output.folder(), []
    print("| grows | size | GFLOP per step | temporary MiB | ms per step | GFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases():
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
    output.write(out, "growth", rows)
    drawing.save(out / "growth.png", lambda: plot(rows))


if __name__ == "__main__":
    command.start(main)
