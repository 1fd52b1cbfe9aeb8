"""Reads the files in which CIFAR-10, MNIST and Tiny Shakespeare are published, with the standard library and NumPy.

Every reader takes the paths of the files and returns the splits: images (uint8 [n,h,w,c]) and labels (integers [n]), or
text. A damaged file may raise any exception. No reader runs code from a file or extracts anything to disk.
"""

import codecs
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LabeledImages = tuple[np.ndarray, np.ndarray]

_LARGEST = 2**29  # bytes, over twice the largest official file: stops decompression bombs

_CIFAR10_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def _batch_files(path: Path, names: list[str]) -> dict[str, bytes]:
    """Returns the contents of the named files of a folder or of a tar.gz archive, which is read in memory."""
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in names}
    files = {}
    with gzip.open(path) as stream:
        bounded: Any = _Bounded(stream)
        with tarfile.open(fileobj=bounded, mode="r|") as tar:
            for member in tar:
                base = os.path.basename(member.name)
                if base in names and member.isfile() and (file := tar.extractfile(member)) is not None:
                    files[base] = file.read()
        while bounded.read(2**20):
            pass  # gzip checks its checksum at the end of the stream, behind the part that tar reads
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{missing[0]} is missing")
    return files


class _Bounded:
    """Reads a decompressed stream and raises `ValueError` at a size that no official file has."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile):
        self._stream = stream
        self._left = _LARGEST

    def read(self, size: int = _LARGEST) -> bytes:
        """Reads as a binary file does."""
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left <= 0:
            raise ValueError(f"it unpacks to more than {_LARGEST // 2**20} MiB")
        return data


def _cifar10(path: Path, suffix: str, parse: Callable[[bytes], LabeledImages]) -> dict[str, LabeledImages]:
    names = [f"{name}{suffix}" for batches in _CIFAR10_BATCHES.values() for name in batches]
    files = _batch_files(path, names)
    splits = {}
    for split, batches in _CIFAR10_BATCHES.items():
        images, labels = zip(*(parse(files[f"{name}{suffix}"]) for name in batches))
        planes = np.concatenate(images).reshape(-1, 3, 32, 32)
        splits[split] = _validated(planes.transpose(0, 2, 3, 1), np.concatenate(labels))
    return splits


def _validated(images: np.ndarray, labels: np.ndarray) -> LabeledImages:
    if images.dtype != np.uint8 or labels.ndim != 1 or not 0 < len(images) == len(labels):
        raise ValueError(f"{images.dtype} images {images.shape} do not match labels {labels.shape}")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} are not in 0..9")
    return np.ascontiguousarray(images), labels


def cifar10_binary(path: Path) -> dict[str, LabeledImages]:
    """Reads the binary version of CIFAR-10: a folder, or its .tar.gz."""

    def parse(data: bytes) -> LabeledImages:
        records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3072)
        return records[:, 1:], records[:, 0]

    return _cifar10(path, ".bin", parse)


def cifar10_python(path: Path) -> dict[str, LabeledImages]:
    """Reads the Python version of CIFAR-10, pickled batches: a folder, or its .tar.gz."""

    def parse(data: bytes) -> LabeledImages:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        return batch[b"data"], np.array(batch[b"labels"], np.int64)

    return _cifar10(path, "", parse)


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles arrays in containers, as a CIFAR-10 batch holds them, and refuses everything that could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Returns one of the four globals that a CIFAR-10 batch needs.

        Raises:
          UnpicklingError: the pickle asks for another one.
        """
        module = module_name.replace("numpy._core", "numpy.core")
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _new_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode_latin1,
        }
        if (module, global_name) not in allowed:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module_name}.{global_name}, which CIFAR-10 does not need"
            )
        return allowed[module, global_name]


def _new_array(cls: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Replaces NumPy's private `_reconstruct`: an empty array, whose state pickle then sets."""
    return np.ndarray.__new__(np.ndarray, shape, np.dtype(dtype))


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, by which Python 3 pickles bytes in protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle asks for the encoding {encoding!r}")
    return codecs.latin_1_encode(text)[0]


def mnist_idx(train_images: Path, train_labels: Path, test_images: Path, test_labels: Path) -> dict[str, LabeledImages]:
    """Reads MNIST's four gzipped files in the idx format."""

    def parse(path: Path, *shape: int) -> np.ndarray:
        with gzip.open(path) as stream:
            data = _Bounded(stream).read()
        # The magic number ends in the number of axes; 8 is unsigned bytes. Big-endian sizes follow, then the values.
        header = np.frombuffer(data, ">u4", count=2 + len(shape))
        if header[0] != 0x0801 + len(shape) or tuple(header[2:]) != shape:
            raise ValueError(f"{path.name} has the header {header.tolist()}")
        return np.frombuffer(data, np.uint8, offset=header.nbytes).reshape(int(header[1]), *shape)

    pairs = {"train": (train_images, train_labels), "test": (test_images, test_labels)}
    return {split: _validated(parse(x, 28, 28)[..., None], parse(y)) for split, (x, y) in pairs.items()}


def mnist_npz(path: Path) -> dict[str, LabeledImages]:
    """Reads Keras's copy of MNIST."""
    with zipfile.ZipFile(path) as archive:
        if (size := sum(member.file_size for member in archive.infolist())) > _LARGEST:
            raise ValueError(f"it unpacks to {size // 2**20} MiB")
    with np.load(path, allow_pickle=False) as arrays:
        return {
            split: _validated(arrays[f"x_{split}"].reshape(-1, 28, 28, 1), arrays[f"y_{split}"])
            for split in ("train", "test")
        }


def shakespeare(path: Path) -> dict[str, str]:
    """Reads the text and splits it by characters as TFDS does: 90% for training, 5% each for validation and test."""
    text = path.read_bytes().decode()
    first = int(len(text) * 0.9)
    second = first + int((len(text) - first) * 0.5)
    splits = {"train": text[:first], "validation": text[first:second], "test": text[second:]}
    if not all(splits.values()):
        raise ValueError(f"{len(text)} characters are too few to split")
    return splits
