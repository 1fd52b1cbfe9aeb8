"""Finds and reads image files, and writes arrays as PNG files.

Files are decoded as in training and evaluation, by the rules of `research.data.decoding`. If the network was trained on
crops, images of any size are cropped and resized as in its evaluation. Otherwise an image of another size is refused:
the choice of resampling would change predictions.
"""

import concurrent.futures
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from launch.artifacts.artifact import ArtifactError
from research.data import decoding

_NUM_SHOWN = 3  # skipped files


def list_files(paths: Sequence[str]) -> list[str]:
    """Lists image files: each folder in `paths` is replaced by those in it and its subfolders, sorted.

    Warns about what is skipped: hidden files, and files without the suffix of an image. As in training, links are
    followed, and hidden folders and folders of thumbnails are ignored.

    Raises:
      ArtifactError: a folder has no image files or cannot be read.
    """
    images: list[str] = []
    skipped: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            images.append(path)
            continue
        files = sorted(_walk(Path(path)))
        if not any(map(_is_image, files)):
            raise ArtifactError(f"{path} has no image files ({', '.join(decoding.SUFFIXES)}): give another folder")
        for file in files:
            (images if _is_image(file) else skipped).append(str(file))
    if skipped:
        shown = ", ".join(skipped[:_NUM_SHOWN]) + (", ..." if len(skipped) > _NUM_SHOWN else "")
        print(f"warning: skipped what is not an image file ({len(skipped)}): {shown}", file=sys.stderr)
    return images


def _walk(top: Path) -> Iterator[Path]:
    """Yields the files of a folder and its subfolders; links back to a parent folder are ignored."""
    # Not recursive: folders may be nested more deeply than Python's calls.
    folders: list[tuple[Path, frozenset[str]]] = [(top, frozenset())]  # with the real paths of the parents
    while folders:
        folder, parents = folders.pop()
        real = os.path.realpath(folder)
        if real in parents:
            continue
        try:
            with os.scandir(folder) as found:
                entries = [(entry.name, entry.is_dir()) for entry in found]
        except OSError as error:
            raise ArtifactError(f"{folder} cannot be read: {error.strerror}") from None
        for name, is_folder in entries:
            if not is_folder:
                yield folder / name
            elif not name.startswith(".") and name not in decoding.IGNORED_FOLDERS:
                folders.append((folder / name, parents | {real}))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in decoding.SUFFIXES and not file.name.startswith(".")


class ImageFiles:
    """Image files, as an array uint8 [n, h, w, c] whose rows are read when they are selected.

    Args:
      paths: the files.
      shape: (h, w, c).
      center_crop: `fraction` of `decoding.decode_center`, for images of any size; None: they must have this shape.

    Raises:
      ArtifactError: a file does not exist, or no image file has c channels.
    """

    ndim = 4

    def __init__(self, paths: Sequence[str], shape: Sequence[int], center_crop: float | None = None):
        if shape[2] not in decoding.MODES:
            raise ArtifactError(f"this network takes {shape[2]} channels, and image files have 1 to 4")
        for path in paths:
            if not os.path.isfile(path):
                raise ArtifactError(f"{path}: no such file")
        self.paths = paths
        self._shape = shape
        self._center_crop = center_crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """Reads the images of these numbers, int [b], in threads; one that is repeated is read once.

        Raises:
          ArtifactError: a file is not an image, or not one that the network takes.
        """
        unique, inverse = np.unique(numbers, return_inverse=True)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self._read, (self.paths[i] for i in unique))))[inverse]

    def _read(self, path: str) -> np.ndarray:
        height, width, channels = self._shape
        try:
            encoded = Path(path).read_bytes()
            if self._center_crop is not None and height == width:
                return decoding.decode_center(encoded, channels, height, self._center_crop)
            return decoding.decode(encoded, channels, (height, width))
        except decoding.SizeError as error:
            raise ArtifactError(f"{path} {error} as this network expects: resize or crop it first") from None
        except decoding.ImageError as error:
            raise ArtifactError(f"{path} {error}") from None
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None


def write(path: Path, image: np.ndarray) -> None:
    """Writes float [h, w, c] in [0, 1] as an 8-bit PNG.

    Raises:
      OSError: it could not be written.
    """
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
