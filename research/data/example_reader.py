"""Reads one example of a source: retries, checks its features, and crops its image."""

import dataclasses
import operator
import sys
import time
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from research import randomness
from research.data import crops, decoding
from research.data.file_errors import UnreadableError
from research.data.source import DamagedError, Source, as_feature
from research.dataset_config import DatasetConfig
from research.errors import UserError
from research.randomness import Stream

_RETRY_SECONDS = (1, 4, 16, 64)  # a network file system may be away for a while


@dataclasses.dataclass(frozen=True)
class CropKey:
    """The seed and the epoch of the random crop of a training example."""

    seed: int
    epoch: int


class ExampleReader:
    """Reads the examples of a split as arrays.

    Args:
      role: "train", "validation" or "test".
      source: the records.
      config: the size of the images, and how they are cropped.
      num_classes: labels must be below it; 0: any.

    Attributes:
      requires_labels: whether an unlabeled example counts as damaged.
    """

    def __init__(self, role: str, source: Source, config: DatasetConfig, num_classes: int):
        self._source = source
        self._config = config
        self._num_classes = num_classes
        self._role = role
        self._size = config.image_size
        if role == "train":
            self._size = config.train_image_size or self._size
        self.requires_labels = False

    def name(self, number: int) -> str:
        """Names an example in messages."""
        return f"{self._role}, {self._source.record_name(number)}"

    def read(
        self,
        number: int,
        key: CropKey | None = None,
        features: Container[str] | None = None,
        image_out: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Reads an example.

        Args:
          number: of the example.
          key: of a random crop; None: the center of the image.
          features: those to read; None: all.
          image_out: where to put the random crop; None: in a new array.

        Returns:
          The features. Images are uint8 [size, size, c], or as they are if the config has no size.

        Raises:
          DamagedError: it is damaged.
          UserError: it cannot be read, or its features are not of a supported kind.
        """
        record = self._record(number)
        if not isinstance(record, Mapping):
            raise UserError(f"{self.name(number)} is a {type(record).__name__}, not a dictionary of features")
        chosen = {name: value for name, value in record.items() if features is None or name in features}
        try:
            return {name: self._as_array(name, value, number, key, image_out) for name, value in chosen.items()}
        except decoding.ImageError as error:
            raise DamagedError(str(error)) from None

    def _record(self, number: int) -> Any:
        for seconds in _RETRY_SECONDS:
            try:
                return self._source[number]
            except UnreadableError as error:
                if not error.is_transient:
                    raise
                print(f"WARNING: {error}; trying again in {seconds} s", file=sys.stderr, flush=True)
                time.sleep(seconds)
        return self._source[number]

    def _as_array(
        self, name: str, value: Any, number: int, key: CropKey | None, image_out: np.ndarray | None
    ) -> np.ndarray:
        if name == "image":
            return self._crop(self._checked_image(value, number), number, key, image_out)
        if name == "label":
            return self._checked_label(value, number)
        return as_feature(f"{self.name(number)}: the feature {name}", value)

    def _checked_label(self, value: Any, number: int) -> np.ndarray:
        try:
            label = operator.index(value)
        except TypeError:
            raise UserError(f"{self.name(number)}: the label {value!r} is not an integer") from None
        most = self._num_classes or 2**31
        if not -1 <= label < most or (label < 0 and self.requires_labels):
            raise DamagedError(f"has the label {label}, which is not in 0..{most - 1}")
        return np.asarray(label, np.int32)

    def _checked_image(self, image: Any, number: int) -> bytes | np.ndarray:
        if not isinstance(image, bytes):
            array = np.asarray(image)
            if self._size and (array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in decoding.MODES):
                raise UserError(
                    f"{self.name(number)}: the image is {array.dtype}{list(array.shape)}; it must be the bytes of an "
                    "image file, or uint8 [height, width, 1 to 4 channels]"
                )
            return array
        if not self._size:
            raise UserError(
                f"--config.dataset.name={self._config.name} has image files of any size: choose the size that they are "
                "resized to, as in --config.dataset.image_size=128"
            )
        return image

    def _crop(self, image: bytes | np.ndarray, number: int, key: CropKey | None, out: np.ndarray | None) -> np.ndarray:
        if isinstance(image, np.ndarray) and not self._size:
            return image
        channels = self._source.channels if isinstance(image, bytes) else image.shape[-1]
        if key is None:
            return decoding.decode_center(image, channels, self._size, self._config.center_crop)
        rng = randomness.example_generator(Stream.CROP, key.seed, key.epoch, number)

        def choose(height: int, width: int) -> crops.Box:
            if self._config.train_crop == "resize":
                return crops.random_square(height, width, rng)
            return crops.random_resized(height, width, rng, self._config.crop_min_area)

        if out is None or out.shape[-1] != channels:
            out = np.empty((self._size, self._size, channels), np.uint8)
        crops.crop(image, choose, out)
        return out
