"""Collects information for a bug report: versions, devices, data sets, caches, and two train steps.

python -m research.doctor

Prints the result of each check, or why it failed, and continues with the next. The exit code is 1 if one failed.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from research.process.terminal import ignore_output_errors

_PACKAGES = (
    *("meshwork", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "grain"),
    *("pillow", "simplejpeg", "opencv-python-headless"),
)
_SETTINGS = ("JAX_", "XLA_", "TFDS_", "MESHWORK_", "CUDA_VISIBLE_", "TPU_", "LIBTPU_")
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
_DATA_SETS = ("cifar10", "mnist", "tiny_shakespeare")


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    for package in _PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} is not installed"


def _settings() -> Iterator[str]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SETTINGS):
            yield f"{name}={'(not shown)' if any(word in name for word in _SECRET_WORDS) else value}"


def _devices() -> Iterator[str]:
    import jax

    from research.process import backend

    backend.check()
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        yield f"{device.id}: {device.device_kind} ({device.platform})" + (
            f", {memory / 2**30:.1f} GiB" if memory else ""
        )
    yield f"process {jax.process_index()} of {jax.process_count()}"


def _data() -> Iterator[str]:
    from research.data import tfds_sets

    folder = tfds_sets.data_folder("")
    for name in _DATA_SETS:
        yield f"{name}: {tfds_sets.find(name, folder) or f'not prepared in {folder}'}"
    yield "digits, pydoc: embedded"


def _caches() -> Iterator[str]:
    from research.data import cache

    folder = cache.folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    yield f"{folder}, " + ("writable" if os.access(existing, os.W_OK) else "not writable: decoding at every start")
    for entry in sorted(folder.glob("*")):
        files = [path for path in entry.rglob("*") if path.is_file()]
        yield f"{entry.name}: {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:,.1f} MiB"


def _two_steps() -> Iterator[str]:
    """Trains the tutorial CNN on the embedded digits for two steps, with the training loop of the experiments."""
    import dataclasses

    import jax

    from research import optimizers, sharding
    from research.config import CNNConfig, Config, DatasetConfig
    from research.data import images, sources
    from research.models import cnn
    from research.process import jax_settings
    from research.tasks.classification import Classification
    from research.training import loop

    jax_settings.pin()
    dataset = sources.load(DatasetConfig(name="digits"))
    config, model = Config(num_epochs=1, batch_size=8 * jax.device_count()), CNNConfig()
    mesh = sharding.make_mesh(config)
    two_batches = {name: array[: 2 * config.batch_size] for name, array in dataset.train.items()}
    dataset = dataclasses.replace(dataset, train=two_batches)
    shape, classes = dataset.train["image"].shape[1:], len(dataset.label_names)
    model = cnn.resolve(model, shape)
    config.optimizer = optimizers.resolve(config.optimizer)
    statistics = images.channel_statistics(dataset.train["image"])
    task = Classification(
        lambda rngs: cnn.create(model, image_shape=shape, num_classes=classes, rngs=rngs), *statistics
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="meshwork-doctor-") as workdir:
        _, summary = loop.train_and_evaluate("doctor", config, task, dataset, mesh, Path(workdir))
    yield (
        f"loss {summary['train_loss']:.4f}, {time.monotonic() - start:.1f} s in total, "
        f"of which {summary['compile_seconds']:.1f} s for compilation"
    )


_CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "versions": _versions,
    "settings": _settings,
    "devices": _devices,
    "data": _data,
    "caches": _caches,
    "two train steps": _two_steps,
}


def run() -> bool:
    """Runs every check and prints the results; returns whether all succeeded."""
    succeeded = True
    for name, check in _CHECKS.items():
        print(f"{name}:")
        try:
            for line in check():
                print(f"  {line}", flush=True)
        except Exception as error:  # reports any error and continues
            succeeded = False
            print(f"  FAILED: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
    print("all checks passed" if succeeded else "a check failed: paste this whole output into the bug report")
    return succeeded


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(str(__doc__).strip())
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    with ignore_output_errors():
        sys.exit(0 if run() else 1)
