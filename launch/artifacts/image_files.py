"""Image files as the arrays that a network takes, and arrays as PNG files.

What converts without surprise is converted: grey, colours, palettes and bits (black and white) to the network's
channels (colours become grey by ITU-R 601 luma), an alpha channel that hides nothing is dropped, and a photograph is
turned as its EXIF data say. What would not be is refused: another size (how one scales decides what a network sees),
pixels that are transparent, samples of 16 or 32 bits, CMYK, animations. The size is looked at before any pixel is
decoded, so a decompression bomb stays packed.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from launch.artifacts.artifact import ArtifactError

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_MODES = {1: "L", 3: "RGB"}
_CONVERTED = ("1", "L", "P", "RGB", "LA", "RGBA")


def read(paths: Sequence[str], shape: Sequence[int]) -> np.ndarray:
    """uint8 [n, h, w, c] of n files, all of `shape` (h, w, c).

    Raises:
      ArtifactError: a file is no image, or not one that the network takes.
    """
    if shape[2] not in _MODES:
        raise ArtifactError(f"this network takes images of {shape[2]} channels, which no image file has")
    return np.stack([_read(path, shape) for path in paths])


def _read(path: str, shape: Sequence[int]) -> np.ndarray:
    height, width, channels = shape
    if not Path(path).is_file():
        raise ArtifactError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings(action="error"), Image.open(path, formats=_FORMATS) as image:
            _check_size(path, image, shape, sorted)  # of a photograph on its side, too, and nothing is decoded yet
            _check_kind(path, image)
            image = ImageOps.exif_transpose(image)
            _check_size(path, image, shape, list)
            return _converted(path, image, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ArtifactError(f"{path} unpacks to too many pixels: this network takes {width}x{height}") from None
    except ArtifactError:
        raise
    except Exception as error:  # Pillow's decoders raise what they like
        known = ", ".join(_FORMATS)
        raise ArtifactError(f"{path} is not an intact image ({known}): {type(error).__name__}") from None


def _check_size(
    path: str, image: Image.Image, shape: Sequence[int], order: Callable[[tuple[int, int]], list[int]]
) -> None:
    height, width, _ = shape
    if order((image.height, image.width)) != order((height, width)):
        raise ArtifactError(
            f"{path} has {image.width}x{image.height} pixels, and this network takes {width}x{height}: scale or crop "
            "it first"
        )


def _check_kind(path: str, image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise ArtifactError(f"{path} is an animation: give one picture")
    # Pillow cuts colours of 16 bits down to 8 without a word, so the file's own header is asked.
    if image.mode not in _CONVERTED or (image.format == "PNG" and _png_depth(path) > 8):
        raise ArtifactError(f"{path} is neither grey nor RGB with 8 bits a channel: save it as such")


def _png_depth(path: str) -> int:
    """Bits a sample."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def _converted(path: str, image: Image.Image, channels: int) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ArtifactError(f"{path} has transparent pixels: put it on a background first")
    array = np.asarray(image.convert("RGB").convert(_MODES[channels]) if image.mode != "L" else image)
    array = array[..., None] if array.ndim == 2 else array
    return np.broadcast_to(array, (*array.shape[:2], channels))


def write(path: Path, image: np.ndarray) -> None:
    """Writes float [h, w, c] in 0..1 as a PNG of 8 bits.

    Raises:
      OSError: it could not be written.
    """
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
