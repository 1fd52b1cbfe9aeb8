"""The paper's network side by side with Keras: the same data, network, optimiser, batch size and precision.

pip install -e ".[bench]" && python -m benchmarks.peers

Each round trains two epochs with Keras and two with Meshwork, each in a process of its own. Compile time is left out:
Keras's speed is that of its second epoch, Meshwork's that of both. Printed are the medians of the rounds and the ratio
within each round.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

ROUNDS = flags.DEFINE_integer("rounds", 3, "how many times each is run", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "examples a step", lower_bound=1)


def keras_epoch(batch_size: int) -> dict[str, float]:
    """Trains the paper's program as its Keras tutorial has it; returns the second epoch's speed and loss."""
    import keras  # pyright: ignore[reportMissingImports]

    from research.config import DatasetConfig
    from research.data import images, sources

    train = sources.load(DatasetConfig(name="cifar10")).train
    mean, std = images.channel_statistics(train["image"])
    pixels = (train["image"].astype("float32") / 255 - mean) / std
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    pixels = pixels.astype("float32")
    model.fit(pixels, train["label"], batch_size=batch_size, epochs=1, verbose=0)
    start = time.monotonic()
    history = model.fit(pixels, train["label"], batch_size=batch_size, epochs=1, verbose=0).history
    return {
        "examples_per_second": len(pixels) / (time.monotonic() - start),
        "train_loss": history["loss"][-1],
        "num_params": model.count_params(),
    }


def meshwork_epoch(batch_size: int) -> dict[str, float]:
    """Trains two epochs of the same by this project's own command; the loss is the second epoch's."""
    from experiments.cifar_cnn import EXPERIMENT
    from research import app as experiment_app

    with tempfile.TemporaryDirectory() as folder:
        flags_ = ["--config=paper", "--config.num_epochs=2", f"--config.batch_size={batch_size}"]
        return experiment_app.run(EXPERIMENT, [*flags_, "--config.dataset.name=cifar10", f"--workdir={folder}/run"])


_RUNS = {"keras": keras_epoch, "meshwork": meshwork_epoch}


def _in_a_process(peer: str, batch_size: int) -> dict[str, float]:
    program = f"import json; from benchmarks import peers; print(json.dumps(peers._RUNS[{peer!r}]({batch_size})))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
    results: dict[str, list[dict[str, float]]] = {peer: [] for peer in _RUNS}
    for number in range(ROUNDS.value):
        for peer in _RUNS:
            results[peer].append(_in_a_process(peer, BATCH_SIZE.value))
            last = results[peer][-1]
            print(
                f"round {number + 1} {peer}: {last['examples_per_second']:,.0f} examples/s, "
                f"loss after two epochs {last['train_loss']:.3f}, {last['num_params']:,} parameters",
                flush=True,
            )
    speeds = {peer: [run["examples_per_second"] for run in runs] for peer, runs in results.items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds["meshwork"], speeds["keras"])]
    for peer, values in speeds.items():
        print(f"{peer}: median {statistics.median(values):,.0f} examples/s")
    print(f"meshwork / keras: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    app.run(main)
