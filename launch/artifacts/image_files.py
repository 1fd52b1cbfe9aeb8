"""Reads image files into the arrays that a network takes, and writes arrays as PNG files.

Lossless or standard conversions are made: gray, color, palette and 1-bit images to the network's channels (color to
gray by ITU-R 601 luma), an opaque alpha channel is dropped, and EXIF orientation is applied. Everything else raises an
error: another size (the choice of resampling would change predictions), transparent pixels, 16 or 32 bits per channel,
CMYK, animations. The size is checked before any pixel is decoded, which defuses decompression bombs.
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
    """Reads n image files of `shape` (h, w, c) as uint8 [n, h, w, c].

    Raises:
      ArtifactError: a file is not an image, or not one that the network takes.
    """
    if shape[2] not in _MODES:
        raise ArtifactError(f"this network takes {shape[2]} channels, and image files have 1 or 3")
    return np.stack([_read(path, shape) for path in paths])


def _read(path: str, shape: Sequence[int]) -> np.ndarray:
    height, width, channels = shape
    if not Path(path).is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="error"), Image.open(path, formats=_FORMATS) as image:
            _check_size(path, image, shape, sorted)  # either orientation; nothing is decoded yet
            _check_kind(path, image)
            image = ImageOps.exif_transpose(image)
            _check_size(path, image, shape, list)
            return _converted(path, image, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ArtifactError(f"{path} has too many pixels: this network takes {width}x{height}") from None
    except ArtifactError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        known = ", ".join(_FORMATS)
        raise ArtifactError(f"{path} is not an intact image ({known}): {type(error).__name__}") from None


def _check_size(
    path: str, image: Image.Image, shape: Sequence[int], order: Callable[[tuple[int, int]], list[int]]
) -> None:
    height, width, _ = shape
    if order((image.height, image.width)) != order((height, width)):
        raise ArtifactError(
            f"{path} has {image.width}x{image.height} pixels, and this network takes {width}x{height}: resize or crop "
            "it first"
        )


def _check_kind(path: str, image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise ArtifactError(f"{path} is an animation: give a single image")
    # Pillow silently truncates 16-bit color to 8 bits, so the PNG header is checked.
    if image.mode not in _CONVERTED or (image.format == "PNG" and _png_depth(path) > 8):
        raise ArtifactError(f"{path} is neither gray nor RGB with 8 bits per channel: convert it first")


def _png_depth(path: str) -> int:
    """Bits per channel, from the header of a PNG file."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def _converted(path: str, image: Image.Image, channels: int) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ArtifactError(f"{path} has transparent pixels: flatten it onto a background first")
    array = np.asarray(image.convert("RGB").convert(_MODES[channels]) if image.mode != "L" else image)
    array = array[..., None] if array.ndim == 2 else array
    return np.broadcast_to(array, (*array.shape[:2], channels))


def write(path: Path, image: np.ndarray) -> None:
    """Writes float [h, w, c] in [0, 1] as an 8-bit PNG.

    Raises:
      OSError: it could not be written.
    """
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
