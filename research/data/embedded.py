"""A data set that needs no download: scikit-learn's handwritten digits."""

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def digits() -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """1,797 handwritten digits (scikit-learn's `load_digits`, 8x8 in 17 greys), enlarged to 32x32.

    The split is fixed and stratified: with the examples sorted by label, every fifth is a test example.

    Returns:
      The label names, and the splits "train" (1,437 examples) and "test" (360), each with "image" (uint8 [n,32,32,1])
      and "label" (int32 [n]).
    """
    from PIL import Image
    from sklearn.datasets import load_digits  # slow to import, and seldom needed

    bunch: Any = load_digits()
    grey = np.round(bunch["images"] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(g).resize((32, 32), Image.Resampling.BILINEAR)) for g in grey]
    images, labels = np.stack(large)[..., None], bunch["target"].astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    splits = {"train": ~is_test, "test": is_test}
    names = tuple(str(name) for name in bunch["target_names"])
    return names, {split: {"image": images[part], "label": labels[part]} for split, part in splits.items()}
