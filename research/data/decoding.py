"""Decodes image files for training, evaluation and `launch.predict`, so that all of them see the same pixels.

It imports only NumPy and Pillow, so that an artifact runs without the rest of `research`. The rules:

- PNG, JPEG (including MPO), BMP, WebP and GIF. Only the first frame is decoded. Color profiles are ignored.
- An image with more than 89 million pixels, or not of the requested size, is refused before it is decoded.
- 16 bits per channel are rounded to 8, as in the PNG specification: round(value * 255 / 65535).
- 1-bit images become 0 and 255. Palettes and CMYK become RGB (CMYK by Pillow's formula, without a profile).
- The orientation in EXIF or XMP data is applied; damaged data of these kinds is ignored.
- Transparent pixels are composited onto white, unless 2 or 4 channels are requested, the last of which is alpha.
- Gray becomes color by repetition, and color becomes gray by ITU-R 601 luma.
"""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".webp", ".gif")
IGNORED_FOLDERS = ("@eaDir", "__MACOSX")  # thumbnails of Synology's file servers; resource forks in macOS's archives
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
NAME = f"rules 1, Pillow {PIL.__version__}"  # part of the cache key; raise the number when a rule changes

# Pillow reads the high bytes of 16-bit channels; for each such raw mode, the one that reads the low bytes.
_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}


# Pillow warns about harmless damage. Not `warnings.catch_warnings`, which does not work in several threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """An image that cannot be decoded; the text continues a sentence that begins with the image's name."""


class SizeError(ImageError):
    """The image does not have the requested size."""


def decode(encoded: bytes, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an image file by the rules above.

    Args:
      encoded: the bytes of the file.
      channels: 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).
      size: the height and width that it must have, or None for any.

    Returns:
      uint8 [h, w, channels], possibly read-only.

    Raises:
      SizeError: it does not have this size.
      ImageError: it is damaged, too large, or of an unknown format.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            # Pillow refuses only twice as many by itself.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            # EXIF orientation may follow the pixels, so the exact check comes after decoding.
            if size and sorted(size) != sorted(image.size):
                raise _size_error(image, size)
            upright = _upright(_to_8_bits(image, encoded))
            if size and size != (upright.height, upright.width):
                raise _size_error(upright, size)
            array = np.asarray(_convert(upright, MODES[channels]))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        raise ImageError(f"is not an intact image ({', '.join(FORMATS)}): {_reason(error)}") from None
    return array[..., None] if array.ndim == 2 else array


def decode_center(encoded: bytes | np.ndarray, channels: int, size: int, fraction: float) -> np.ndarray:
    """Decodes an image file, and resizes its center to a square, as in evaluation.

    The shorter side is resized to `size / fraction` and the center cropped, in one step (bilinear, with antialiasing).

    Args:
      encoded: the bytes of the file, or an image of uint8 [h, w, channels].
      channels: as for `decode`.
      size: the side of the result.
      fraction: the side of the center square, as a fraction of the image's shorter side.

    Returns:
      uint8 [size, size, channels].

    Raises:
      ImageError: as `decode`.
    """
    array = decode(encoded, channels) if isinstance(encoded, bytes) else encoded
    height, width = array.shape[:2]
    side = min(height, width) * fraction
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box)).reshape(size, size, channels)


def describe(shape: Sequence[int], fraction: float | None) -> dict[str, Any]:
    """Describes how an image file becomes a network's input, in words and numbers, for programs without this module.

    Args:
      shape: (h, w, c) of the input.
      fraction: as for `decode_center`; None: images must have this shape.

    Returns:
      JSON values.
    """
    alpha = (
        "kept as the last channel, and weighting the colors when resized"
        if MODES[shape[2]].endswith("A")
        else "composited onto white"
    )
    described = {
        "color": MODES[shape[2]],
        "decoding": (
            "first frame; EXIF orientation applied; color profiles ignored; 16 bits per channel rounded to 8; palettes "
            f"and CMYK converted to RGB; alpha {alpha}; gray by ITU-R 601 luma"
        ),
        "size": list(shape[:2]),
    }
    if fraction is None:
        return described | {"crop": None, "resize": "none: images must have this size"}
    return described | {
        "crop": {
            "shape": "square",
            "side": f"{fraction} * min(height, width) pixels of the decoded image, not rounded",
            "fraction": fraction,
            "center": "(height / 2, width / 2), not rounded",
        },
        "resize": (
            "the crop to the size in one step, first along the width, then along the height, each rounded to 8 bits"
        ),
        "interpolation": (
            "bilinear with antialiasing (Pillow's BILINEAR with box=crop): with scale = side / size, output pixel i is "
            "the mean of the pixels j of the image, also of those outside the crop, with weights "
            "max(0, 1 - abs(j + 0.5 - start - (i + 0.5) * scale) / max(scale, 1)), where start is the crop's edge"
        ),
    }


def orientation(encoded: bytes) -> int:
    """Returns the EXIF orientation of an image file, 1 to 8; 1, upright, if it has none or cannot be read."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return _orientation(image)
    except Exception:  # Pillow's decoders raise exceptions of many types
        return 1


def _reason(error: Exception) -> str:
    # Pillow's message about an unknown format contains a memory address, which differs from run to run.
    text = "" if isinstance(error, PIL.UnidentifiedImageError) else str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _size_error(image: Image.Image, size: tuple[int, int]) -> SizeError:
    return SizeError(f"has {image.width}x{image.height} pixels, not {size[1]}x{size[0]}")


def _to_8_bits(image: Image.Image, encoded: bytes) -> Image.Image:
    depth = encoded[24] if image.format == "PNG" else 8  # the first chunk of a PNG file is its header
    if depth in (2, 4, 16) and image.mode != "P" and "transparency" in image.info:
        # Pillow compares this color, which is not scaled to 8 bits, with pixels that are.
        raise ImageError(f"has a transparent color and {depth} bits per channel: store it with 8 bits per channel")
    if depth < 16:
        return image
    values = np.asarray(image).astype(np.uint32)
    if values.ndim == 3:  # Pillow has kept the high bytes only
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as low_image:
            tile: Any = low_image.tile[0]
            *place, raw_mode = tile
            tile = (*place, _LOW_BYTES[raw_mode])
            low_image.tile = [tile]
            low = np.asarray(low_image)
        values = values * 256 + (low[..., [1, 1, 1, 3]] if raw_mode == "LA;16B" else low)
    rounded = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    rounded.info = image.info
    return rounded


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises exceptions of many types
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not mode.endswith("A"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode != "L":
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.convert(mode)
