"""Data sets that need no download: scikit-learn's handwritten digits, and the text of Python's `help()` topics."""

import functools
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

from research.data import cache
from research.data.cache import Arrays


def digits() -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Loads scikit-learn's 1,797 handwritten digits (`load_digits`, 8x8 in 17 grays), enlarged to 32x32.

    The split is fixed and stratified: with the examples sorted by label, every fifth is a test example.

    Returns:
      The label names, and the splits "train" (1,437 examples) and "test" (360), each with "image" (uint8 [n,32,32,1])
      and "label" (int32 [n]), read-only.
    """
    # The read-only arrays are shared between calls, the dictionaries are not: a caller may change its own.
    return tuple("0123456789"), {split: dict(arrays) for split, arrays in _digits_splits().items()}


@functools.cache  # a sweep loads them several times
def _digits_splits() -> dict[str, Arrays]:
    arrays = cache.load(f"digits-{version('scikit-learn')}", _enlarged_digits)
    is_test = np.zeros(len(arrays["label"]), bool)
    is_test[np.argsort(arrays["label"], kind="stable")[::5]] = True
    parts = {"train": ~is_test, "test": is_test}
    return {
        split: cache.read_only({name: array[part] for name, array in arrays.items()}) for split, part in parts.items()
    }


def _enlarged_digits() -> Iterator[Arrays]:
    from PIL import Image
    from sklearn.datasets import load_digits  # takes two seconds to import, which the cache saves

    bunch: Any = load_digits()
    gray = np.round(bunch["images"] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in gray]
    yield {"image": np.stack(large)[..., None], "label": bunch["target"].astype(np.int32)}


def pydoc() -> tuple[tuple[str, ...], dict[str, Arrays]]:
    """Loads the text of Python's `help()` topics (`pydoc_data.topics`), sorted by topic: some 460,000 bytes of UTF-8.

    The text belongs to the running Python, so results are comparable within one Python version only.

    Returns:
      No label names (an empty tuple), and the splits "train" (the first 90%), "validation" and "test" (5% each), each
      with "text" (uint8 [number of bytes]), read-only.
    """
    from pydoc_data.topics import topics  # half a megabyte, rarely needed

    text = np.frombuffer("\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    train, validation, test = np.split(text, [len(text) * 90 // 100, len(text) * 95 // 100])
    return (), {"train": {"text": train}, "validation": {"text": validation}, "test": {"text": test}}


DATASETS = {"digits": digits, "pydoc": pydoc}
