"""Measures images per second from encoded photographs to batches of random-resized crops on the device.

python -m benchmarks.input --images=DIR [--cores=1,2] [--rounds=5] [--peers=tf_data,dali]

Needs `pip install -e ".[bench]" torchvision`, and `nvidia-dali-cuda120` for DALI; a peer that is not installed is left
out. Each pipeline runs in a process of its own on the given number of cores, in turn, in every round. The JPEG files of
DIR are repeated to at least 1,000. `meshwork_resized` reads a copy with a shorter side of 256 pixels.
"""

import importlib.util
import statistics
import tempfile
from pathlib import Path

from absl import flags

from benchmarks import command, output
from benchmarks.input.pipelines import PIPELINES
from research.errors import UserError

_IMAGES = flags.DEFINE_string("images", None, "folder of JPEG files", required=True)
_CORES = flags.DEFINE_list("cores", ["1", "2"], "numbers of cores to use")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each pipeline is measured", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "seconds of each measurement", lower_bound=0.01)
_SIZE = flags.DEFINE_integer("size", 224, "side of the crops", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "images of a batch", lower_bound=1)
_PEERS = flags.DEFINE_list("peers", None, "peers to measure; all that are installed by default")

_NEEDS = {
    "tf_data": "tensorflow",
    "torchvision_pil": "torchvision",
    "torchvision_tensors": "torchvision",
    "dali": "nvidia.dali",
}
_LEAST_FILES = 1000
_RESIZED = 256  # pixels of the shorter side


def _peers() -> list[str]:
    chosen = _PEERS.value if _PEERS.value is not None else list(_NEEDS)
    if unknown := [peer for peer in chosen if peer not in _NEEDS]:
        raise UserError(f"--peers={unknown[0]}: use {', '.join(_NEEDS)}")
    return [peer for peer in chosen if _installed(_NEEDS[peer])]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _resized_copy(files: list[str], folder: Path) -> Path:
    """Writes a resized copy of the photographs with `research.data.resize`; returns its folder."""
    photographs = folder / "photographs"
    for number, file in enumerate(files):
        target = photographs / "train" / str(number % 2)  # an image folder has two classes or more
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number}.jpg").symlink_to(file)
    options = ["--name=folder", f"--data_dir={photographs}", f"--out={folder / 'copy'}", f"--side={_RESIZED}"]
    command.run("the resized copy", ["-m", "research.data.resize", *options])
    return folder / "copy" / "photographs"


def _speed(name: str, files: Path, cores: int) -> float:
    arguments = [name, files, _SIZE.value, _BATCH.value, _SECONDS.value, cores]
    return float(command.run(name, ["-m", "benchmarks.input.pipelines", *map(str, arguments)]).split()[-1])


def main() -> None:
    core_counts = command.numbers("cores", _CORES.value, int)
    out, peers = output.folder(), _peers()
    images = Path(_IMAGES.value).expanduser().resolve()
    files = sorted(map(str, images.glob("*.[jJ][pP]*[gG]"))) if images.is_dir() else []
    if not files:
        raise UserError(f"--images={images}: no JPEG files there")
    with tempfile.TemporaryDirectory() as temporary:
        lists = {name: Path(temporary) / name for name in ("original", "meshwork_resized")}
        files *= -(-_LEAST_FILES // len(files))
        lists["original"].write_text("\n".join(files), encoding="utf-8")
        lists["meshwork_resized"].write_text(str(_resized_copy(files, Path(temporary))), encoding="utf-8")
        rows = []
        for cores in core_counts:
            speeds: dict[str, list[float]] = {
                name: [] for name in PIPELINES if name.startswith("meshwork") or name in peers
            }
            for _ in range(_ROUNDS.value):
                for name, measured in speeds.items():
                    measured.append(_speed(name, lists.get(name, lists["original"]), cores))
                    print(f"{cores} cores, {name}: {measured[-1]:,.0f} images/s", flush=True)
            rows += [
                {
                    "peer": name,
                    "cores": cores,
                    "images_per_second": round(statistics.median(measured), 1),
                    "ratio": round(statistics.median(ours / x for ours, x in zip(speeds["meshwork"], measured)), 3),
                    "rounds": len(measured),
                }
                for name, measured in speeds.items()
            ]
    for row in output.merge(out, "input", rows, ("peer", "cores")):
        print(f"{row['peer']:<20} {row['cores']} cores  {row['images_per_second']:>8,.0f} images/s  {row['ratio']:.2f}")


if __name__ == "__main__":
    command.start(main)
