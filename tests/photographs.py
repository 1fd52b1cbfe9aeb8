"""Makes image files of many kinds, sizes and colors, and folders of them."""

import io
import threading

import numpy as np
from PIL import Image

from research.data.source import DamagedError, Source
from research.dataset_config import DatasetConfig


def gradient(height, width, seed=0):
    """A smooth color image, uint8 [height, width, 3]: chroma that JPEG stores at half resolution stays close."""
    rng = np.random.default_rng(seed)
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    waves = [np.sin(2 * np.pi * (a * y + b * x + c)) for a, b, c in rng.uniform(0.2, 1, (3, 3))]
    return np.round(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


def encode(pixels, kind="JPEG", mode="RGB", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def rotated_exif(orientation=6):
    """EXIF data that says how the image is rotated."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def make_folder(path, classes=("cat", "dog"), counts=(("train", 12), ("test", 6)), side=40):
    """An image folder in which the class is the color: `path/<split>/<class>/<number>.jpg`, sizes vary."""
    rng = np.random.default_rng(0)
    for split, count in counts:
        for label, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(side, 2 * side, 2)
                pixels = np.clip(gradient(height, width, number) * 0.2 + 150 * (np.arange(3) == label), 0, 255)
                data = encode(pixels.astype(np.uint8), quality=90)
                (path / split / name / f"{number}.jpg").write_bytes(data)
    return path


class Records(Source):
    """Images in memory; those in `damaged` cannot be read."""

    fingerprint = "records"

    def __init__(self, count=20, damaged=(), **features):
        self._images = [encode(gradient(20 + 3 * i, 60, i), "PNG") for i in range(count)]
        self._damaged = damaged
        self._features = features
        self.reads = []

    def __len__(self):
        return len(self._images)

    def __getitem__(self, number):
        self.reads.append((number, threading.current_thread().name))
        if number in self._damaged:
            raise DamagedError("is torn")
        return {"image": self._images[number], "label": number % 3} | {
            name: value(number) for name, value in self._features.items()
        }

    def record_name(self, number):
        return f"page {number}"


def book_config(**changes):
    """The config of a data set of `Records`."""
    return DatasetConfig(**{"name": "book", "image_size": 16} | changes)


def read_training(split, numbers, epoch=0, seed=0):
    """The training examples of these numbers, in one epoch."""
    numbers = np.array(numbers)
    return split.training(numbers, np.full_like(numbers, epoch), seed)
