"""Writes folders of pictures, and opens them."""

import io
import os

from PIL import Image

from research.data import folder

_BUFFER = io.BytesIO()
Image.new("RGB", (2, 2), "red").save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()


def add(data_dir, *paths, content=PNG):
    """Writes a file at each path, str or bytes, relative to `data_dir`."""
    for path in paths:
        file = os.path.join(os.fsencode(data_dir), os.fsencode(path))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(content)


def load(data_dir, hold_out=False):
    """The names of the classes, and all splits."""
    names, loaders = folder.load(str(data_dir), hold_out=hold_out)
    return names, {split: loader() for split, loader in loaders.items()}


def train(data_dir):
    return folder.load(str(data_dir), hold_out=False)[1]["train"]()


def labels(source):
    """The label of each file, by its path."""
    assert [source[number]["label"] for number in range(len(source))] == source.labels.tolist()
    return dict(zip(source.keys(), source.labels.tolist(), strict=True))
