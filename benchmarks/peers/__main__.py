"""Speed of this project and its peers on the same work: in turn, each in its own process, for several rounds.

pip install -e ".[bench]" && python -m benchmarks.peers [--work=cnn,lstm] [--peer=torch] [--rounds=3]

Every process gets the same examples in the same order, the same initial weights, Adam, batch size and precision. The
first epoch is not timed, and its mean losses must agree, which shows that the work is the same; the speed is that of
all other epochs together. A ratio is this project's speed over the peer's in the same round. The work "startup"
compares this project's whole command with training in each peer: time to the end of the first step, and peak memory.
"evaluation" and "sampling" train nothing. It needs cifar10, mnist and tiny_shakespeare (`TFDS_DATA_DIR`).
"""

import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import command
from benchmarks.peers import table, works

OURS = "meshwork"
PEERS = {
    "keras": ("keras", "keras+graph", "keras+jax"),
    "torch": ("torch", "torch+compile"),
    "flax": ("flax",),
}  # and their variants
_NAMES = {*PEERS, *(variant for variants in PEERS.values() for variant in variants)}
# Keras's recurrent networks cannot be called for a single step. The Transformer and the hierarchical VAE are written
# for PyTorch only.
UNSUPPORTED = {"sample": ("keras",), "transformer": ("keras", "flax"), "hierarchical_vae": ("keras", "flax")}
RESULTS = Path(__file__).parent.parent / "results" / "peers.json"

WORK = flags.DEFINE_list("work", list(works.WORKS), f"works to run: {', '.join(works.WORKS)}")
PEER = flags.DEFINE_list("peer", list(PEERS), f"peers to compare with: {', '.join(PEERS)}; +variant for one of them")
ROUNDS = flags.DEFINE_integer("rounds", 3, "how many times each side is run", lower_bound=1)
LONGER = flags.DEFINE_integer("longer", 1, "factor of the steps per epoch, limited by the images", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", 3, "epochs of each run; the first is not timed", lower_bound=2)
flags.register_validator("peer", lambda names: set(names) <= _NAMES, f"use {', '.join(sorted(_NAMES))}")
flags.register_validator("work", lambda names: set(names) <= set(works.WORKS), f"use {', '.join(works.WORKS)}")


def run(peer: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Runs the work in the folder with `peer` ("torch", "torch+compile") and returns its report."""
    backend = {"KERAS_BACKEND": "jax" if peer == "keras+jax" else "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    args = ["-m", "benchmarks.peers.process", peer, str(folder), str(epochs), str(time.time())]
    return json.loads(command.run(peer, args, backend).splitlines()[-1])


def _arrays() -> tuple[dict[str, np.ndarray], np.ndarray]:
    from research.config import DatasetConfig
    from research.data import sources

    cifar10, mnist, text = (
        sources.load(DatasetConfig(name=name)).train for name in ("cifar10", "mnist", "tiny_shakespeare")
    )
    images = {"cifar10": cifar10["image"], "label": cifar10["label"], "mnist": mnist["image"]}
    return images, np.unique(text["text"], return_inverse=True)[1].astype(np.uint8)


def _longer(work: works.Work, images: dict[str, np.ndarray]) -> works.Work:
    """Returns the work with more steps per epoch; text is repeated, images are not."""
    count = len(images["mnist" if work.reads_digits else "cifar10"])
    most = math.inf if work.reads_text else count // work.batch_size
    return dataclasses.replace(work, steps=min(work.steps * LONGER.value, most))


def measure(work: works.Work, peers: list[str], folder: Path, rounds: int, epochs: int) -> list[dict[str, Any]]:
    """Runs this project and every peer in turn, and returns the rows of the table."""
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *peers)}
    for number in range(rounds):
        for name, done in reports.items():
            done.append(run(name, folder, epochs))
            print(f"round {number + 1}  {table.line(work, name, done[-1])}", flush=True)
    return [table.row(work, name, reports[OURS], reports[name]) for name in peers]


def main() -> None:
    chosen = [variant for name in PEER.value for variant in PEERS.get(name, (name,))]
    images, text = _arrays()
    rows = []
    for work in (_longer(work, images) for name in WORK.value for work in works.WORKS[name]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.savez(folder / "arrays.npz", **works.make(work, images, text))  # pyright: ignore[reportArgumentType]
            (folder / "work.json").write_text(json.dumps(vars(work)), encoding="utf-8")
            if work.does == "command":  # fills the compilation cache, as at a user's second start
                run(OURS, folder, 1)
            unsupported = UNSUPPORTED.get(work.does, ()) + UNSUPPORTED.get(work.network, ())
            peers = [peer for peer in chosen if not peer.startswith(unsupported)]
            rows += measure(work, peers, folder, ROUNDS.value, EPOCHS.value)
        RESULTS.write_text(json.dumps(table.merged(RESULTS, rows), indent=1) + "\n", encoding="utf-8")
    print(table.markdown(rows))


if __name__ == "__main__":
    command.start(main)
