"""Small Hugging Face sets of images."""

import io

import datasets
import numpy as np
import PIL.Image

from research.data import hugging_face

NAMES = ("cat", "dog", "newt")
FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))}


def encode(number, kind="PNG"):
    """An encoded image; its size and mode depend on the number."""
    shape = (4 + number % 3, 5 + number % 2) + ((3,) if number % 4 else ())
    pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


IMAGES = [encode(number, ("PNG", "JPEG")[number % 2]) for number in range(9)]


def examples(count, features=FEATURES, **columns):
    """A `Dataset` of the first images, with labels 0, 1, 2, 0, ..."""
    columns = {"image": IMAGES[:count], "label": [number % 3 for number in range(count)]} | columns
    columns = {name: [*columns[name]] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save(dataset, path):
    """Writes a `Dataset` or `DatasetDict` with `save_to_disk`."""
    dataset.save_to_disk(path)
    return str(path)


def save_parquet(splits, folder, name="{split}.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, dataset in splits.items():
        dataset.to_parquet(folder / name.format(split=split))
    return str(folder)


def open_split(name, split="train", data_dir=""):
    return hugging_face.load(str(name), str(data_dir))[1][split]()
