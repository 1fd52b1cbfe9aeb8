"""Artifacts of functions without weights, and images for them."""

import numpy as np
from PIL import Image

from launch.artifacts import artifact
from launch.artifacts.runtimes import described
from launch.export import _export
from research.tasks.task import ExportedFunction

SHAPE = (4, 6, 3)  # h, w, c


def write(out, classes, functions):
    """An artifact of functions of no weights but those in their code."""
    weights = {"w": np.ones(2, np.float32)}
    exported = {name: _export(name, function, lambda _: None, weights) for name, function in functions.items()}
    manifest = {
        "classes": list(classes),
        "platforms": ["cpu"],
        "weights": {"w": {"shape": [2], "dtype": "float32"}},
        "functions": {name: described(e) for name, e in exported.items()},
    }
    programs = {name: bytes(e.serialize()) for name, e in exported.items()}
    artifact.write(out, manifest, weights, programs)
    return out


def write_classifier(out):
    """An artifact whose logits are the sums of the channels, times 2e-4: red, green or blue."""

    def classify(_, inputs):
        return {"logits": inputs["image"].astype("float32").sum((1, 2)) * 2e-4}

    functions = {"classify": ExportedFunction(classify, {"image": ("b, 4, 6, 3", "uint8")}, "")}
    return write(out, ("red", "green", "blue"), functions)


def save_image(path, array, **options):
    Image.fromarray(np.asarray(array)).save(path, **options)
    return str(path)


def color_images(tmp_path, count=3):
    """Files that are red, green, blue, and so on."""
    return [
        save_image(tmp_path / f"{i}.png", np.full(SHAPE, np.uint8(80)) + np.eye(3, dtype="u1")[i % 3] * 100)
        for i in range(count)
    ]
